"""The program of the fresh process: reads a base, with an adapter or not, by mlx_lm.load.

Its answer to a request is what each of its models computes, or which of them cannot be used. An
error that it raises is the machine's, and says nothing about a model. It imports nothing of this
project.
"""

import gc
import hashlib
import json
import runpy
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

gc.disable()  # until all is imported, which stays: see backend.collecting_no_garbage()
# transformers would import torch where it is installed, which takes seconds, so torch is not to be
# found until mlx_lm is imported. backend.hide_torch_from_transformers() does the same for processes
# of this project; this one, which has just started, shares no code with them.
sys.modules["torch"] = None  # type: ignore[assignment]

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm import load  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

del sys.modules["torch"]
gc.freeze()
gc.enable()

answer_questions = runpy.run_path(str(Path(__file__).with_name("questions.py")))["answer_questions"]


class MlxLmReader:
    """A base, a base with an adapter, or an exported folder, by mlx_lm.load.

    positions: how many of a row's positions may have their logits in memory at once.
    """

    def __init__(self, base: str, adapter: str | None, request: dict[str, Any]) -> None:
        trusts = {"trust_remote_code": request["trust_remote_code"]}
        self.model, self.tokenizer = load(base, trusts, adapter_path=adapter, **trusts)[:2]
        self.positions = request["positions"]
        self.name = f"mlx_lm {version('mlx-lm')}"
        self.chat_template = self.tokenizer.chat_template
        self.ends = sorted(self.tokenizer.eos_token_ids)

    def exchange_adapter(self, loaded: str, other: str) -> bool:
        """Load another adapter into the layers of one that is loaded; False if they are not alike.

        It is what mlx_lm.load does last: `load_weights` of all tensors, here where both adapters
        have tensors of the same names and shapes, and their configurations ask for the same layers.
        """
        if read_config(loaded) != read_config(other):
            return False
        files = [f"{adapter}/adapters.safetensors" for adapter in (loaded, other)]
        weights: list[Any] = [mx.load(file) for file in files]
        shapes = [{name: array.shape for name, array in tensors.items()} for tensors in weights]
        if shapes[0] != shapes[1]:
            return False
        self.model.load_weights(list(weights[1].items()), strict=False)
        return True

    def compute_in(self, dtype: str | None) -> None:
        """Compute in this type; None is what each array is stored in."""
        if dtype is not None:
            self.model.set_dtype(getattr(mx, dtype))

    def factors(self) -> list[str]:
        """The names of the model's LoRA factors."""
        names = [str(leaf[0]) for leaf in tree_flatten(self.model.parameters())]
        return [name for name in names if name.endswith((".lora_a", ".lora_b"))]

    def tokenizer_digest(self) -> str:
        """SHA-256 of tokenizer.json as it is in use."""
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        return list(map(int, self.tokenizer.encode(text)))

    def logits(self, tokens: list[int], places: list[int]) -> Iterator[Any]:
        """Logits after the tokens at these ascending places, float32 (some of them, vocabulary).

        A longer row than may have all of its logits is read in pieces, each with the keys and
        values of those before, as mlx_lm reads a long prompt.
        """
        size = self.positions
        cache = make_prompt_cache(self.model) if len(tokens) > size else None
        for start in range(0, len(tokens), size):
            output = self.model(mx.array([tokens[start : start + size]]), cache=cache)
            output = output[0] if isinstance(output, tuple) else output
            needed = [place - start for place in places if start <= place < start + size]
            if needed:
                yield np.array(output[0][mx.array(needed)].astype(mx.float32))
            if cache is not None:
                mx.eval([layer.state for layer in cache])

    def answer(self, prompt: list[int], max_tokens: int, stop: list[str]) -> dict[str, Any]:
        """The likeliest tokens after a prompt up to a stop or the end of the text, and their text.

        The token that ends the text is one of them.
        """
        tokens: list[int] = []
        for token, _ in generate_step(mx.array(prompt), self.model, max_tokens=max_tokens):
            tokens.append(int(token))
            if tokens[-1] in self.ends:
                break
            if stop and any(text in self.tokenizer.decode(tokens) for text in stop):
                break
        return {"tokens": tokens, "text": self.tokenizer.decode(tokens)}


def read_config(adapter: str) -> dict[str, Any]:
    """What adapter_config.json says of the layers."""
    with open(f"{adapter}/adapter_config.json", encoding="utf-8") as file:
        config = json.load(file)
    return {key: config.get(key) for key in ("fine_tune_type", "num_layers", "lora_parameters")}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return what each model of the request computes, by the model's name.

    The base is loaded once for models in sequence whose adapters have the same tensors. If a model
    cannot be loaded or computed, its name and the error are returned in place of all. OSError,
    MemoryError and RuntimeError (which MLX raises for memory, files and compilers) are not caught.
    """
    answers: dict[str, Any] = {}
    reader: Any = None
    loaded: dict[str, Any] = {}
    for model in request["models"]:
        try:
            if not can_exchange(reader, loaded, model):
                reader = None  # two bases are not to be in memory at once
                reader = MlxLmReader(model["base"], model["adapter"], request)
            loaded = model
            reader.compute_in(model["dtype"])
            answers[model["name"]] = answer_questions(reader, request | model["asked"])
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            reader = None
            return describe_refusal(request, model, error)
    return answers


def can_exchange(reader: Any, loaded: dict[str, Any], model: dict[str, Any]) -> bool:
    """Exchange the adapter that is loaded for that of a model, unless another base is asked for."""
    if reader is None or model["adapter"] is None or loaded["adapter"] is None:
        return False
    if (loaded["base"], loaded["dtype"]) != (model["base"], model["dtype"]):
        return False
    return bool(reader.exchange_adapter(loaded["adapter"], model["adapter"]))


def describe_refusal(
    request: dict[str, Any], model: dict[str, Any], error: Exception
) -> dict[str, Any]:
    """Blame the model's adapter for an error, or the base, if that cannot be loaded alone.

    An error of the base alone in what it is asked is raised.
    """
    try:
        base = MlxLmReader(model["base"], None, request)
    except (LookupError, TypeError, ValueError) as base_error:
        return {"refused": "base", "error": f"{type(base_error).__name__}: {base_error}"}
    base.compute_in(model["dtype"])
    answer_questions(base, request | model["asked"])
    return {"refused": model["name"], "error": f"{type(error).__name__}: {error}"}
