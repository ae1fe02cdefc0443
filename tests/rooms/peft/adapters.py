"""PEFT's adapters for the example model with something changed, and what models say with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from nested_core.storage.safetensors_files import load_arrays, save_arrays
from tests.example import MODEL
from tests.rooms.peft.make_golden import GOLDEN, TOKENS

Arrays = dict[str, mx.array]
PREFIX = "base_model.model."


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
