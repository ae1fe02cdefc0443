"""Adapters and base models on disk, as they should be but for what a test changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME, write_adapter
from nested_core.storage.safetensors_files import load_arrays, save_arrays
from tests.example import MODEL

Arrays = dict[str, mx.array]
LAST_Q_AND_UP = ["self_attn.q_proj", "mlp.up_proj"]


def change_tensors(folder: Path, change: Callable[[Arrays], object]) -> Path:
    """Write an adapter's tensors again, changed."""
    tensors = load_arrays(folder / WEIGHTS_NAME)
    change(tensors)
    save_arrays(folder / WEIGHTS_NAME, tensors)
    return folder


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write adapter_config.json again, changed."""
    config = json.loads((folder / CONFIG_NAME).read_bytes())
    change(config)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return folder


def name_base(folder: Path, base: Path) -> Path:
    """Let an adapter say that it is of this base, whatever files it was trained on."""

    def change(config: dict[str, Any]) -> None:
        config.pop("base_fingerprint", None)
        config["model"] = str(base)

    return change_config(folder, change)


def base_copy(
    folder: Path,
    change: Callable[[Arrays], object] | None = None,
    *,
    file: str = "config.json",
    **keys: Any,
) -> Path:
    """The example's base model with its weights changed, and other keys in one of its files."""
    shutil.copytree(MODEL, folder)
    if change is not None:
        weights = load_arrays(folder / "model.safetensors")
        change(weights)
        save_arrays(folder / "model.safetensors", weights)
    if keys:
        said = json.loads((folder / file).read_bytes())
        (folder / file).write_text(json.dumps(said | keys))
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
