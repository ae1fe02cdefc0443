"""The copy of an adapter that `adapter_path` asks for, under mlx-lm's own file names."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from nested_core.errors import ConfigError
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME
from nested_core.storage.atomic import write_bytes


def require_writable(adapter_path: Path) -> None:
    """Make the folder, so that what stands in its way is known before there is an adapter."""
    if adapter_path.exists() and not adapter_path.is_dir():
        raise ConfigError(f"adapter_path: {adapter_path} is a file; give a folder.")
    adapter_path.mkdir(parents=True, exist_ok=True)
    if not os.access(adapter_path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(adapter_path))


def export_snapshot(source: Path, adapter_path: Path, iteration: int) -> None:
    """Copy an adapter as mlx_lm.lora saves one: as the current one, and under its iteration."""
    export_adapter(source, adapter_path)
    weights = (source / WEIGHTS_NAME).read_bytes()
    write_bytes(adapter_path / f"{iteration:07d}_{WEIGHTS_NAME}", weights)


def export_adapter(source: Path, adapter_path: Path) -> None:
    """Copy an adapter's two files to where mlx_lm.generate --adapter-path finds them."""
    adapter_path.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        write_bytes(adapter_path / name, (source / name).read_bytes())
