"""Checkpoints: atomic, hashed directories with all that training needs to go on.

A checkpoint is complete or absent. One that was changed since is named and passed over.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from nested_core.errors import DamagedError
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME, write_adapter
from nested_core.storage.atomic import Confirm, new_directory, write_json
from nested_core.storage.manifest import verify_manifest, write_manifest
from nested_core.storage.safetensors_files import load_arrays, save_arrays
from nested_core.storage.strict_files import read_json

OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
MAX_STATE_BYTES = 64 * 1024 * 1024
MASTERS = "masters:"  # before the names of float32 masters, beside the optimizer's own
CHECKPOINT_NAME = re.compile(r"^step-(\d{7,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint directory: its path, optimizer step and state.json."""

    path: Path
    step: int
    state: dict[str, Any]

    def parameters(self) -> dict[str, mx.array]:
        """The trained parameters by name: the float32 masters of those that have one."""
        arrays = load_arrays(self.path / OPTIMIZER_NAME).items()
        masters = {n.removeprefix(MASTERS): a for n, a in arrays if n.startswith(MASTERS)}
        return load_arrays(self.path / WEIGHTS_NAME) | masters

    def optimizer_state(self) -> Any:
        """The optimizer's state tree."""
        arrays = load_arrays(self.path / OPTIMIZER_NAME).items()
        return tree_unflatten([(n, array) for n, array in arrays if not n.startswith(MASTERS)])


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step stands."""
    return folder / f"step-{step:07d}"


def write_checkpoint(
    folder: Path,
    *,
    adapter: Mapping[str, mx.array],
    adapter_config: Mapping[str, Any],
    optimizer_state: Any,
    state: Mapping[str, Any],
    masters: Mapping[str, mx.array] | None = None,
    confirm: Confirm | None = None,
) -> Path:
    """Write one checkpoint durably under its step's name and return its path.

    `adapter` holds the tensors as they are published; `masters` the float32 values of those that
    are trained in a wider dtype than they are published in. `confirm` is called just before the
    checkpoint takes its name; what it raises leaves no checkpoint.
    """
    target = checkpoint_path(folder, state["step"])
    folder.mkdir(parents=True, exist_ok=True)
    with new_directory(target, replace=True, confirm=confirm) as temporary:
        write_adapter(temporary, adapter, adapter_config)
        optimizer = dict(tree_flatten(optimizer_state))
        optimizer |= {MASTERS + name: array for name, array in (masters or {}).items()}
        save_arrays(temporary / OPTIMIZER_NAME, optimizer)
        write_json(temporary / STATE_NAME, dict(state))
        write_manifest(temporary, {"step": state["step"]})
    return target


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify every byte of a checkpoint and read its state; DamagedError where it was changed."""
    match = CHECKPOINT_NAME.match(path.name)
    if match is None:
        raise DamagedError(f"{path} is not a checkpoint: its name is not step-NNNNNNN.")
    step = int(match[1])
    if not path.is_dir():
        raise DamagedError(f"{path} is not a directory.")
    if verify_manifest(path).get("step") != step:
        raise DamagedError(f"{path} holds the manifest of another step.")
    state = read_json(path / STATE_NAME, MAX_STATE_BYTES)
    if not isinstance(state, dict) or state.get("step") != step:
        raise DamagedError(f"{path / STATE_NAME} is not the state of step {step}.")
    return Checkpoint(path, step, state)


def latest_state(folder: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint, which is not verified; {} if it cannot be read."""
    with suppress(DamagedError, IndexError):
        state = read_json(list_checkpoints(folder)[-1] / STATE_NAME, MAX_STATE_BYTES)
        return state if isinstance(state, dict) else {}
    return {}


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint; a damaged one is warned of, by name, and passed over.

    Every byte is hashed. Raises DamagedError if there are checkpoints and none is sound.
    """
    paths = list_checkpoints(folder)
    problems = []
    for path in reversed(paths):
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


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint directories, oldest first."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if CHECKPOINT_NAME.match(path.name)]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step-")))


def prune_checkpoints(folder: Path, *, keep_last: int, keep_steps: Collection[int]) -> None:
    """Remove all but the last `keep_last` checkpoints and those of `keep_steps`."""
    kept = {checkpoint_path(folder, step) for step in keep_steps}
    for path in list_checkpoints(folder)[:-keep_last]:
        if path not in kept:
            shutil.rmtree(path)


def publish_adapter(checkpoint: Path, target: Path, *, confirm: Confirm | None = None) -> None:
    """Copy the adapter of a checkpoint, byte for byte, to an adapter directory."""
    with new_directory(target, replace=True, confirm=confirm) as temporary:
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            shutil.copyfile(checkpoint / name, temporary / name)
