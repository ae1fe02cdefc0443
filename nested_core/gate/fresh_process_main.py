"""The program of the fresh process: loads base and adapter by mlx_lm.load, as any user's would.

It reads a request and writes its answer, both JSON. It imports nothing of this project.
"""

import json
import sys
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import load


def answer(request: dict[str, Any], adapter: str) -> dict[str, Any]:
    """The names of the model's LoRA factors, and a row of logits for each prompt."""
    model = load(
        request["model"],
        tokenizer_config={"trust_remote_code": request["trust_remote_code"]},
        adapter_path=adapter,
        trust_remote_code=request["trust_remote_code"],
    )[0]
    if request["dtype"] is not None:
        model.set_dtype(getattr(mx, request["dtype"]))
    rows = []
    for prompt in request["prompts"]:
        output = model(mx.array([prompt]))
        last = (output[0] if isinstance(output, tuple) else output)[0, -1].astype(mx.float32)
        columns = request["columns"] or range(0, last.size, max(1, last.size // 256))
        rows.append(last[mx.array(list(columns))].tolist())
    names = [str(leaf[0]) for leaf in tree_flatten(model.parameters())]
    factors = [name for name in names if name.endswith((".lora_a", ".lora_b"))]
    return {"factors": factors, "logits": rows}


def main(request_path: str, answer_path: str) -> None:
    """Answer one request, for each of its adapters in turn."""
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    answers = [answer(request, adapter) for adapter in request["adapters"]]
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
