"""Checkpoint folders: their names, and whether their hashes match. Nothing here needs MLX."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from nested_core.errors import DamagedError
from nested_core.storage.manifest import Manifest, read_verified_manifest
from nested_core.storage.untrusted_files import read_json_object

STATE_NAME = "state.json"
MAX_STATE_BYTES = 64 * 1024 * 1024
CHECKPOINT_NAME_PATTERN = re.compile(r"^step-(\d{7,})$")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of an optimizer step."""
    return folder / f"step-{step:07d}"


def checkpoint_step(path: Path) -> int:
    """Return the optimizer step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the paths of the checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if CHECKPOINT_NAME_PATTERN.match(path.name)]
    return sorted(named, key=checkpoint_step)


def verified_state(path: Path) -> tuple[int, dict[str, Any], Manifest]:
    """Verify all hashes of a checkpoint; return its step, state.json and manifest.

    Raises DamagedError if anything was changed.
    """
    match = CHECKPOINT_NAME_PATTERN.match(path.name)
    if match is None:
        raise DamagedError(f"{path} is not a checkpoint: its name is not step-NNNNNNN.")
    step = int(match[1])
    if path.is_symlink() or not path.is_dir():
        raise DamagedError(f"{path} is not a directory.")
    manifest = read_verified_manifest(path)
    if manifest["facts"].get("step") != step:
        raise DamagedError(f"{path} holds the manifest of another step.")
    state = read_json_object(path / STATE_NAME, MAX_STATE_BYTES)
    if state.get("step") != step:
        raise DamagedError(f"{path / STATE_NAME} is not the state of step {step}.")
    return step, state, manifest


def newest_sound_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose hashes match, from which training would resume.

    Returns None if no checkpoint is sound.
    """
    for path in reversed(list_checkpoints(folder)):
        with suppress(DamagedError):
            verified_state(path)
            return path
    return None


def latest_state(folder: Path) -> dict[str, Any]:
    """Read state.json of the newest checkpoint without verifying it; {} if it cannot be read."""
    with suppress(DamagedError, IndexError):
        return read_json_object(list_checkpoints(folder)[-1] / STATE_NAME, MAX_STATE_BYTES)
    return {}
