"""The interface of rooms that read and write adapters in formats of other programs.

nested_core/rooms/ROOMS.toml names the rooms' formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core import seams


@dataclass(frozen=True)
class Conversion:
    """A converted adapter: its folder, adapter_config.json, counts, and notes for the user.

    strength: rank and scale in the terms of the format, such as `r 8, alpha 16`.
    """

    out: Path
    config: dict[str, Any]
    modules: int
    tensors: int
    strength: str
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Describe on one line what was written."""
        return f"{self.out}: {self.tensors} tensors of {self.modules} modules, {self.strength}"

    def to_json(self) -> dict[str, Any]:
        """Return the document that --json prints."""
        return {
            "out": str(self.out),
            "modules": self.modules,
            "tensors": self.tensors,
            "config": self.config,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class AdapterFormat:
    """A room's format of adapters of another program.

    name: how an audit calls the format.
    is_adapter: returns whether a folder holds files of this format, and not those of mlx-lm.
    import_adapter: converts the adapter in a folder to mlx-lm's format, into a new folder, for a
        base by its folder or hub name.
    export_adapter: converts an adapter of mlx-lm to this format; the base may be None.

    Both raise ConfigError for what mlx-lm or the other program does not support, and DamagedError
    for damaged files.
    """

    name: str
    is_adapter: Callable[[Path], bool]
    import_adapter: Callable[[Path, Path, str], Conversion]
    export_adapter: Callable[[Path, Path, str | None], Conversion]


def find_format(folder: Path) -> AdapterFormat | None:
    """Return the format of the adapter in a folder; None for mlx-lm's format or no adapter."""
    return next((one for one in seams.load_all(AdapterFormat) if one.is_adapter(folder)), None)
