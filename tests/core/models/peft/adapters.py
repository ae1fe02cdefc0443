"""Adapters of both kinds for the example model, as they should be and changed in some way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

from nested_core.storage.adapter import write_adapter
from nested_core.storage.safetensors_files import load_arrays, save_arrays
from tests.core.models.peft.make_golden import GOLDEN, TOKENS
from tests.example import MODEL

Arrays = dict[str, mx.array]
PREFIX = "base_model.model."
LAST_Q_AND_UP = ["self_attn.q_proj", "mlp.up_proj"]


def peft_copy(
    folder: Path,
    case: str = "lora",
    *,
    change: Callable[[Arrays], object] = lambda tensors: None,
    **config: Any,
) -> Path:
    """A copy of a golden PEFT adapter, with some keys and tensors changed."""
    shutil.copytree(GOLDEN / case, folder)
    (folder / "logits.safetensors").unlink()
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | config))
    tensors = load_arrays(weights)
    change(tensors)
    save_arrays(weights, tensors)
    return folder


def random_adapter(
    folder: Path,
    *,
    num_layers: int = 2,
    rank: int = 4,
    scale: float = 2.0,
    keys: list[str] | None = None,
    kind: str = "lora",
    dtype: mx.Dtype = mx.float32,
    **config: Any,
) -> Path:
    """An adapter directory with everything that mlx-lm attaches, filled with random numbers."""
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys or LAST_Q_AND_UP}
    model, _ = load_model(MODEL)
    model.freeze()
    linear_to_lora_layers(model, num_layers, parameters, use_dora=kind == "dora")
    mx.random.seed(3)
    leaves = dict(tree_flatten(model.trainable_parameters()))
    tensors = {name: _random(name, leaf).astype(dtype) for name, leaf in sorted(leaves.items())}
    folder.mkdir(parents=True)
    said = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters}
    write_adapter(folder, tensors, said | {"model": str(MODEL)} | config)
    return folder


def _random(name: str, leaf: mx.array) -> mx.array:
    if name.endswith(".m"):
        return leaf * mx.random.uniform(0.8, 1.2, leaf.shape)
    return 0.15 * mx.random.normal(leaf.shape)


def mlx_logits(adapter: Path | None = None) -> np.ndarray:
    """What the example model says at TOKENS in float32, with an adapter that mlx-lm loads."""
    model, _ = load_model(MODEL)
    model.set_dtype(mx.float32)
    if adapter is not None:
        load_adapters(model, str(adapter))
    model.eval()
    return np.array(model(mx.array([TOKENS]))[0])


def same_bytes(one: Mapping[str, mx.array], other: Mapping[str, mx.array]) -> bool:
    """Whether two sets of tensors have the same names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and np.array_equal(_bits(one[name]), _bits(other[name]))
        for name in one
    )


def _bits(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint8))
