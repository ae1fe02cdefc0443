"""The program of the fresh process: loads base and adapter by mlx_lm.load, as any user's would.

Its answer to a request is logits, or that an adapter cannot be used. An error that it raises is the
machine's or the base model's, and says nothing about an adapter. It imports nothing of this
project.
"""

import gc
import json
import sys
from typing import Any

gc.disable()  # until all is imported, which stays: see backend.collecting_no_garbage()
# transformers would import torch where it is installed, which takes seconds, so torch is not to be
# found until mlx_lm is imported. backend.hide_torch_from_transformers() does the same for processes
# of this project; this one, which has just started, shares no code with them.
sys.modules["torch"] = None  # type: ignore[assignment]

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm import load  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402

del sys.modules["torch"]
gc.freeze()
gc.enable()

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


def compute_canary(request: dict[str, Any], model: Any, tokenizer: Any) -> dict[str, Any]:
    """Logits and greedy answers of the trained model in the types that it is stored in."""
    answers = []
    for prompt in request["questions"]:
        tokens = []
        for token, _ in generate_step(
            mx.array(prompt), model, max_tokens=request["max_answer_tokens"]
        ):
            tokens.append(int(token))
            if tokens[-1] in tokenizer.eos_token_ids:
                break
        answers.append({"tokens": tokens, "text": tokenizer.decode(tokens)})
    return {"logits": compute_rows(request, model), "answers": answers}


def compute_logits_with_adapter(
    request: dict[str, Any], adapter: str | None
) -> tuple[dict[str, Any], Any, Any]:
    """The answer with an adapter (or none), its model and tokenizer; blamed is what the base gives.

    An OSError, MemoryError or RuntimeError (MLX's for memory, files and compilers) blames nobody.
    """
    try:
        model, tokenizer = load_model(request, adapter)
        return compute_logits(request, model), model, tokenizer
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        try:
            base = load_model(request, None)[0]
        except (LookupError, TypeError, ValueError) as base_error:
            raise BaseRefused(f"{type(base_error).__name__}: {base_error}") from base_error
        compute_logits(request, base)
        raise AdapterRefused(f"{type(error).__name__}: {error}") from error


def read_config(adapter: str) -> dict[str, Any]:
    """What adapter_config.json says of the layers."""
    with open(f"{adapter}/adapter_config.json", encoding="utf-8") as file:
        config = json.load(file)
    return {key: config.get(key) for key in ("fine_tune_type", "num_layers", "lora_parameters")}


def replace_adapter(model: Any, loaded: str, other: str) -> bool:
    """Load another adapter into the layers of one that is loaded; False where they are not alike.

    It is what mlx_lm.load does last: `load_weights` of all tensors, here where both adapters have
    tensors of the same names and shapes, and their configurations ask for the same layers.
    """
    if read_config(loaded) != read_config(other):
        return False
    files = [f"{adapter}/adapters.safetensors" for adapter in (loaded, other)]
    weights: list[Any] = [mx.load(file) for file in files]
    shapes = [{name: array.shape for name, array in tensors.items()} for tensors in weights]
    if shapes[0] != shapes[1]:
        return False
    model.load_weights(list(weights[1].items()), strict=False)
    return True


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """An answer with either adapter, and without any if the first one's logits are not finite."""
    answers: dict[str, Any] = {"base": None}
    initial, trained = request["initial"], request["trained"]
    side = "trained"
    try:
        try:
            answers["trained"], model, tokenizer = compute_logits_with_adapter(request, trained)
        except AdapterRefused:
            side = "initial"  # which is told first where neither can be used
            compute_logits_with_adapter(request, initial)
            side = "trained"
            raise
        is_as_stored = request["dtype"] is None
        if request["questions"] and is_as_stored:
            answers["canary"] = compute_canary(request, model, tokenizer)
        side = "initial"
        if initial is not None and replace_adapter(model, trained, initial):
            answers["initial"] = compute_logits(request, model)
        else:
            del model  # two bases are not to be in memory at once
            answers["initial"], _, _ = compute_logits_with_adapter(request, initial)
    except AdapterRefused as refusal:
        return {"refused": side, "error": str(refusal)}
    except BaseRefused as refusal:
        return {"refused": "base", "error": str(refusal)}
    if not all(abs(logit) < INFINITY for row in answers["initial"]["logits"] for logit in row):
        answers["base"] = compute_logits(request, load_model(request, None)[0])
    if request["questions"] and not is_as_stored:
        answers["canary"] = compute_canary(request, *load_model(request, trained))
    return answers
