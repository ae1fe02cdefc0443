"""The interface of rooms that read and write adapters in formats of other programs.

nested_core/rooms/__init__.py lists the rooms' formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nested_core import seams
from nested_core.storage.safetensors_files import StoredTensor

Shape = tuple[int, ...]


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
class DescribedAdapter:
    """An adapter of another format, and the tensors that its configuration requires on a base.

    tensors: those in the file, under mlx-lm's names and transposed as in mlx-lm.
    expected: the shape of each tensor that the configuration requires.
    scales: the factor on lora_a @ lora_b, by module.
    unmatched_targets: names in the configuration that match no module of the base.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    expected: Mapping[str, Shape]
    scales: Mapping[str, float]
    unmatched_targets: tuple[str, ...]


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

    def describe(self, folder: Path, sides: Mapping[str, tuple[int, int]]) -> DescribedAdapter:
        """Read an adapter for a base.

        `sides` has the numbers of inputs and outputs of the base's linear modules, by name.
        """
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
