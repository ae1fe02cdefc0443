"""Checkpoints: atomically written, hashed directories with all that training needs to resume.

A checkpoint is complete or absent. One that was changed afterwards is reported and skipped.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from nested_core.errors import DamagedError
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME, write_adapter
from nested_core.storage.atomic import Confirm, new_directory, write_json
from nested_core.storage.checkpoint_verification import (
    STATE_NAME,
    checkpoint_path,
    list_checkpoints,
    verified_state,
)
from nested_core.storage.manifest import Manifest, write_manifest
from nested_core.storage.safetensors_files import load_arrays, save_arrays

OPTIMIZER_NAME = "optimizer.safetensors"
MASTERS_PREFIX = "masters:"  # before the names of float32 masters, beside the optimizer's own


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint directory: its path, optimizer step, state.json and manifest."""

    path: Path
    step: int
    state: dict[str, Any]
    manifest: Manifest

    def parameters(self) -> dict[str, mx.array]:
        """Read the trained parameters by name, from their float32 master copies if there."""
        arrays = load_arrays(self.path / OPTIMIZER_NAME).items()
        masters = {
            n.removeprefix(MASTERS_PREFIX): a for n, a in arrays if n.startswith(MASTERS_PREFIX)
        }
        return load_arrays(self.path / WEIGHTS_NAME) | masters

    def optimizer_state(self) -> Any:
        """Read the optimizer's state as a tree."""
        arrays = load_arrays(self.path / OPTIMIZER_NAME).items()
        return tree_unflatten([(n, one) for n, one in arrays if not n.startswith(MASTERS_PREFIX)])


def write_checkpoint(
    folder: Path,
    *,
    adapter: Mapping[str, mx.array],
    adapter_config: dict[str, object],
    optimizer_state: object,
    state: Mapping[str, Any],
    masters: Mapping[str, mx.array] | None = None,
    confirm: Confirm | None = None,
) -> Path:
    """Write a checkpoint durably to a folder named by its step; return its path.

    adapter_config: the content of adapter_config.json. optimizer_state: a tree of arrays.
    adapter: the tensors in the dtype that they are published in.
    masters: float32 master copies of tensors that are published in a narrower dtype; they are
        stored with the optimizer's arrays.
    state: the content of state.json; `step` names the folder.
    confirm: a last check by the caller, such as that it still holds the run's lock, called just
        before the rename; if it raises, there is no checkpoint.
    """
    target = checkpoint_path(folder, state["step"])
    folder.mkdir(parents=True, exist_ok=True)
    with new_directory(target, replace=True, confirm=confirm) as temporary:
        write_adapter(temporary, adapter, adapter_config)
        optimizer = dict(tree_flatten(optimizer_state))
        optimizer |= {MASTERS_PREFIX + name: array for name, array in (masters or {}).items()}
        save_arrays(temporary / OPTIMIZER_NAME, optimizer)
        write_json(temporary / STATE_NAME, dict(state))
        write_manifest(temporary, {"step": state["step"]})
    return target


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify all hashes of a checkpoint and read its state; DamagedError if it was changed."""
    return Checkpoint(path, *verified_state(path))


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint whose hashes match; None if there are no checkpoints.

    A damaged one is skipped with a warning. Raises DamagedError if all are damaged.
    """
    problems = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return read_checkpoint(path)
        except DamagedError as error:
            problems.append(str(error))
            warnings.warn(
                f"Checkpoint {path.name} is damaged, trying the one before: {error}", stacklevel=2
            )
    if problems:
        raise DamagedError(f"No checkpoint in {folder} is sound. The newest: {problems[0]}")
    return None


def prune_checkpoints(folder: Path, *, keep_last: int, keep_steps: Collection[int]) -> None:
    """Remove all checkpoints except the last `keep_last` and those of `keep_steps`."""
    kept = {checkpoint_path(folder, step) for step in keep_steps}
    for path in list_checkpoints(folder)[:-keep_last]:
        if path not in kept:
            shutil.rmtree(path)


def publish_adapter(checkpoint: Path, target: Path, *, confirm: Confirm | None = None) -> None:
    """Copy a checkpoint's adapter files, byte for byte, to an adapter directory."""
    with new_directory(target, replace=True, confirm=confirm) as temporary:
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            shutil.copyfile(checkpoint / name, temporary / name)
