"""The program of the fresh process: loads base and adapter by mlx_lm.load, as any user's would.

It reads a request and writes its answer, both JSON: logits, or that an adapter cannot be used. An
error that ends it is the machine's or the base model's, and says nothing about an adapter. It
imports nothing of this project.
"""

import json
import sys
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.generate import generate_step

INFINITY = float("inf")


class AdapterRefused(Exception):  # noqa: N818  # an answer, not an error of this program
    """The base model answers alone, and not with this adapter."""


class BaseRefused(Exception):  # noqa: N818  # an answer as well
    """The base model cannot be loaded alone."""


def load_model(request: dict[str, Any], adapter: str | None) -> Any:
    """The base model, with an adapter unless that is None, and its tokenizer."""
    return load(
        request["model"],
        tokenizer_config={"trust_remote_code": request["trust_remote_code"]},
        adapter_path=adapter,
        trust_remote_code=request["trust_remote_code"],
    )[:2]


def compute_logits(request: dict[str, Any], model: Any) -> dict[str, Any]:
    """The names of the model's LoRA factors, and a row of logits for each prompt."""
    if request["dtype"] is not None:
        model.set_dtype(getattr(mx, request["dtype"]))
    names = [str(leaf[0]) for leaf in tree_flatten(model.parameters())]
    factors = [name for name in names if name.endswith((".lora_a", ".lora_b"))]
    return {"factors": factors, "logits": compute_rows(request, model)}


def compute_rows(request: dict[str, Any], model: Any) -> list[Any]:
    """A row of logits for each prompt."""
    rows = []
    for prompt in request["prompts"]:
        output = model(mx.array([prompt]))
        last = (output[0] if isinstance(output, tuple) else output)[0, -1].astype(mx.float32)
        columns = request["columns"] or range(0, last.size, max(1, last.size // 256))
        rows.append(last[mx.array(list(columns))].tolist())
    return rows


def compute_canary(request: dict[str, Any]) -> dict[str, Any]:
    """Logits and greedy answers of the trained model in the types that it is stored in."""
    model, tokenizer = load_model(request, request["trained"])
    answers = []
    for prompt in request["questions"]:
        answer = []
        for token, _ in generate_step(
            mx.array(prompt), model, max_tokens=request["max_answer_tokens"]
        ):
            answer.append(int(token))
            if answer[-1] in tokenizer.eos_token_ids:
                break
        answers.append({"tokens": answer, "text": tokenizer.decode(answer)})
    return {"logits": compute_rows(request, model), "answers": answers}


def compute_logits_with_adapter(request: dict[str, Any], adapter: str | None) -> dict[str, Any]:
    """The answer with an adapter (or none), blaming it only for what the base alone does not give.

    An OSError, MemoryError or RuntimeError (MLX's for memory, files and compilers) blames nobody.
    """
    try:
        return compute_logits(request, load_model(request, adapter)[0])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        try:
            base = load_model(request, None)[0]
        except (LookupError, TypeError, ValueError) as base_error:
            raise BaseRefused(f"{type(base_error).__name__}: {base_error}") from base_error
        compute_logits(request, base)
        raise AdapterRefused(f"{type(error).__name__}: {error}") from error


def compute_all_logits(request: dict[str, Any]) -> dict[str, Any]:
    """An answer with either adapter, and without any if the first one's logits are not finite."""
    answers: dict[str, Any] = {"base": None}
    for side in ("initial", "trained"):
        try:
            answers[side] = compute_logits_with_adapter(request, request[side])
        except AdapterRefused as refusal:
            return {"refused": side, "error": str(refusal)}
        except BaseRefused as refusal:
            return {"refused": "base", "error": str(refusal)}
    if not all(abs(logit) < INFINITY for row in answers["initial"]["logits"] for logit in row):
        answers["base"] = compute_logits(request, load_model(request, None)[0])
    if request["questions"]:
        answers["canary"] = compute_canary(request)
    return answers


def main(request_path: str, answer_path: str) -> None:
    """Answer one request."""
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    answers = compute_all_logits(request)
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
