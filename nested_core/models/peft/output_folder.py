"""The folder that a converted adapter is written to: it appears complete or not at all.

A folder that has anything in it is never written to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError
from nested_core.storage.atomic import new_directory
from nested_core.storage.output_places import require_absent_or_empty


@dataclass(frozen=True)
class Conversion:
    """A converted adapter: its folder, adapter_config.json, counts, and notes for the user."""

    out: Path
    config: dict[str, Any]
    modules: int
    tensors: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document that --json prints."""
        return {
            "out": str(self.out),
            "modules": self.modules,
            "tensors": self.tensors,
            "config": self.config,
            "notes": list(self.notes),
        }


@contextmanager
def creating_adapter_folder(out: Path, own_run: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out`, which may exist only as an empty folder."""
    try:
        require_absent_or_empty(out, own_run)
        with new_directory(out) as folder:
            yield folder
            if out.is_dir():
                out.rmdir()
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}.") from error
