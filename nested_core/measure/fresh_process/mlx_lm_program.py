"""The program of the fresh process, which loads a base, with or without an adapter, by mlx_lm.load.

It answers a request with what each of its models computes, or with which model cannot be used. An
error that it raises concerns the machine, and says nothing about a model. It imports nothing of
this project.
"""

import gc
import hashlib
import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

gc.disable()  # imported objects live until the end: see backend.collecting_no_garbage()
# transformers would import torch if it is installed, which takes seconds. So torch is hidden until
# mlx_lm is imported. backend.hide_torch_from_transformers() does the same in processes of this
# project, whose code this process does not share.
sys.modules["torch"] = None  # type: ignore[assignment]

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm import load  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.tuner.utils import load_adapters  # noqa: E402

sys.modules.pop("torch", None)  # where backend hides it too, that has taken this mark away
gc.freeze()
gc.enable()

answer_questions = runpy.run_path(str(Path(__file__).with_name("questions.py")))["answer_questions"]


class MlxLmReader:
    """A base, a base with an adapter, or an exported folder, loaded by mlx_lm.load.

    positions: the most positions of a row whose logits may be in memory at once.
    """

    def __init__(self, base: str, adapter: str | None, request: dict[str, Any]) -> None:
        """Load a base with mlx_lm.load, with an adapter's folder if one is given."""
        trusts = {"trust_remote_code": request["trust_remote_code"]}
        self.model, self.tokenizer = load(base, trusts, adapter_path=adapter, **trusts)[:2]
        self.positions = request["positions"]
        self.name = f"mlx_lm {version('mlx-lm')}"
        self.chat_template = self.tokenizer.chat_template
        self.ends = sorted(self.tokenizer.eos_token_ids)

    def attach_adapter(self, adapter: str) -> None:
        """Attach an adapter to the base alone, as mlx_lm.load does once it has loaded the base."""
        self.model = load_adapters(self.model, adapter)
        self.model.eval()

    def exchange_adapter(self, loaded: str, other: str) -> bool:
        """Load another adapter into the layers of a loaded one; False if their layers differ.

        It does what mlx_lm.load does last, `load_weights` of all tensors. This gives the same model
        if both adapters have tensors of the same names and shapes, and their configurations
        describe the same layers.
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
        """Convert the model to this dtype, such as "float32"; None keeps the stored types."""
        if dtype is not None:
            self.model.set_dtype(getattr(mx, dtype))

    def factors(self) -> list[str]:
        """Return the names of the model's LoRA factors."""
        names = [str(leaf[0]) for leaf in tree_flatten(self.model.parameters())]
        return [name for name in names if name.endswith((".lora_a", ".lora_b"))]

    def tokenizer_digest(self) -> str:
        """Return the SHA-256 of tokenizer.json as mlx_lm has loaded it."""
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return list(map(int, self.tokenizer.encode(text)))

    def logits(self, tokens: list[int], places: list[int]) -> Iterator[Any]:
        """Yield the logits at these ascending positions of a row, float32 (positions, vocabulary).

        A row longer than `self.positions` is read in pieces with the model's cache, as mlx_lm reads
        a long prompt, and yields an array for each piece.
        """
        size = self.positions
        cache = make_prompt_cache(self.model) if len(tokens) > size else None
        for start in range(0, len(tokens), size):
            output = self.model(mx.array([tokens[start : start + size]]), cache=cache)
            output = output[0] if isinstance(output, tuple) else output
            indices = [place - start for place in places if start <= place < start + size]
            if indices:
                yield np.array(output[0][mx.array(indices)].astype(mx.float32))
            if cache is not None:
                mx.eval([layer.state for layer in cache])

    def answer(self, prompt: list[int], max_tokens: int, stop: list[str]) -> dict[str, Any]:
        """Generate greedily until a stop text or the end of the text, and return tokens and text.

        The token that ends the text is included.
        """
        tokens: list[int] = []
        for token, _ in generate_step(mx.array(prompt), self.model, max_tokens=max_tokens):
            tokens.append(int(token))
            if tokens[-1] in self.ends:
                break
            if stop and any(text in self.tokenizer.decode(tokens) for text in stop):
                break
        return {"tokens": tokens, "text": self.tokenizer.decode(tokens)}


loaded_ahead: dict[str, MlxLmReader] = {}  # the base alone, by its folder


def load_ahead(base: str, request: dict[str, Any]) -> dict[str, object]:
    """Load a base that will be asked for; an error is told when it is."""
    with suppress(Exception):
        loaded_ahead[base] = MlxLmReader(base, None, request)
    return {"is_loaded_ahead": base in loaded_ahead}


def read_model(model: dict[str, Any], request: dict[str, Any]) -> MlxLmReader:
    """Load a model of the request, from the base that was loaded ahead if there is one."""
    reader = loaded_ahead.pop(model["base"], None)
    loaded_ahead.clear()  # two bases may not fit into memory
    if reader is None:
        return MlxLmReader(model["base"], model["adapter"], request)
    if model["adapter"] is not None:
        reader.attach_adapter(model["adapter"])
    return reader


def read_config(adapter: str) -> dict[str, object]:
    """Return the keys of adapter_config.json that determine the adapter's layers."""
    with open(f"{adapter}/adapter_config.json", encoding="utf-8") as file:
        config = json.load(file)
    return {key: config.get(key) for key in ("fine_tune_type", "num_layers", "lora_parameters")}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return what each model of the request computes, by the model's name.

    A model is a base and an adapter. If its base is that of the model before, and its adapter has
    tensors of the same names and shapes, only the adapter's tensors are exchanged, and the base is
    not loaded again. If a model cannot be loaded or computed, its name and the error are returned
    in place of all results. OSError, MemoryError and RuntimeError (which MLX raises for memory,
    files and compilers) are not caught.

    request: `models`, each with the questions for it alone (`asked`), and the questions for all; or
        `load_ahead`, the base of a request to come.
    """
    if "load_ahead" in request:
        return load_ahead(request["load_ahead"], request)
    answers: dict[str, object] = {}
    reader: Any = None  # holds the loaded model
    loaded: dict[str, object] = {}  # the entry of `models` that the reader holds
    for model in request["models"]:
        try:
            if not try_exchange(reader, loaded, model):
                reader = None  # frees the old base first: two may not fit into memory
                reader = read_model(model, request)
            loaded = model
            reader.compute_in(model["dtype"])
            answers[model["name"]] = answer_questions(reader, request | model["asked"])
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            reader = None  # frees the memory: the description may load the base alone
            return describe_refusal(request, model, error)
    return answers


def try_exchange(reader: Any, loaded: dict[str, Any], model: dict[str, Any]) -> bool:
    """Load the adapter of `model` into the loaded base; False if it needs a newly loaded base.

    `loaded` describes the model that the reader holds.
    """
    if reader is None or model["adapter"] is None or loaded["adapter"] is None:
        return False
    if (loaded["base"], loaded["dtype"]) != (model["base"], model["dtype"]):
        return False
    return bool(reader.exchange_adapter(loaded["adapter"], model["adapter"]))


def describe_refusal(
    request: dict[str, Any], model: dict[str, Any], error: Exception
) -> dict[str, object]:
    """Return which one caused an error: the base, if it cannot be loaded alone, or the adapter.

    An error of the base alone while it computes the answers is raised.
    """
    try:
        base = MlxLmReader(model["base"], None, request)
    except (LookupError, TypeError, ValueError) as base_error:
        return {"refused": "base", "error": f"{type(base_error).__name__}: {base_error}"}
    base.compute_in(model["dtype"])
    answer_questions(base, request | model["asked"])
    return {"refused": model["name"], "error": f"{type(error).__name__}: {error}"}
