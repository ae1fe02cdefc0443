"""Adapters and base models on disk, as they should be but for what a test changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME
from nested_core.storage.safetensors_files import load_arrays, save_arrays
from tests.example import MODEL

Arrays = dict[str, mx.array]


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
