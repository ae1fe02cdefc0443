"""Run as a program of its own: what any user's program sees of a base model and an adapter.

It reads a request and writes logits, as JSON; all it knows of models is mlx_lm.load. Nothing of
this project is imported here.
"""

import json
import sys
from typing import Any

import mlx.core as mx
from mlx_lm import load


def logits(request: dict[str, Any], adapter: str) -> list[list[float]]:
    """The last position's logits after each prompt, at the columns asked for."""
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
        columns = request["columns"] or range(min(last.size, 256))
        rows.append(last[mx.array(list(columns))].tolist())
    return rows


def main(request_path: str, answer_path: str) -> None:
    """Answer one request: the logits with each adapter, one adapter after the other."""
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    answers = [logits(request, adapter) for adapter in request["adapters"]]
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
