"""The interface of rooms that read and write adapters in formats of other programs.

nested_core/rooms/__init__.py lists the rooms' formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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


class AdapterFormat(Protocol):
    """A format of adapters of another program.

    name: how an audit calls the format. The paths are folders; `model` is the base's folder or its
        hub name. Each method raises ConfigError for what mlx-lm or the other program does not
        support, and DamagedError for damaged files.
    """

    name: str

    def is_adapter(self, folder: Path) -> bool:
        """Whether a folder holds files of this format, and not those of mlx-lm."""
        ...

    def import_adapter(self, folder: Path, out: Path, model: str) -> Conversion:
        """Convert an adapter of this format to mlx-lm's format, into the new folder `out`."""
        ...

    def export_adapter(self, folder: Path, out: Path, model: str | None = None) -> Conversion:
        """Convert an adapter of mlx-lm to this format, into the new folder `out`."""
        ...


def find_format(folder: Path) -> AdapterFormat | None:
    """Return the format of the adapter in a folder; None for mlx-lm's format or no adapter."""
    formats: Iterator[AdapterFormat] = (make() for make in seams.load_all("adapter_format"))
    return next((known for known in formats if known.is_adapter(folder)), None)


def load_peft_format(wanted: str) -> AdapterFormat:
    """Return PEFT's format; ConfigError, naming what `wanted` it, if its room is not installed."""
    adapter_format: AdapterFormat = seams.load_only("adapter_format", wanted)()
    return adapter_format
