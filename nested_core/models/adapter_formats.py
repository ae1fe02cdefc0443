"""Formats in which other programs keep adapters: what a room that knows one offers.

nested_core/rooms/__init__.py names the rooms' formats.
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

    strength: rank and scale in the words of the format, such as `r 8, alpha 16`.
    """

    out: Path
    config: dict[str, Any]
    modules: int
    tensors: int
    strength: str
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """What was written, in a line."""
        return f"{self.out}: {self.tensors} tensors of {self.modules} modules, {self.strength}"

    def to_json(self) -> dict[str, Any]:
        """The document that --json prints."""
        return {
            "out": str(self.out),
            "modules": self.modules,
            "tensors": self.tensors,
            "config": self.config,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class DescribedAdapter:
    """An adapter of another format, and the tensors that its configuration calls for on a base.

    tensors: of the file, under mlx-lm's names and transposed as mlx-lm has them.
    expected: the shape of each tensor that the configuration calls for.
    scales: the factor on lora_a @ lora_b, by module.
    unmatched_targets: names in the configuration that fit no module of the base.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    expected: Mapping[str, Shape]
    scales: Mapping[str, float]
    unmatched_targets: tuple[str, ...]


class AdapterFormat(Protocol):
    """A format of adapters of another program.

    name: what it is called in an audit. The paths are folders; `model` is the base's folder or its
    name on the hub. Each method raises ConfigError for what mlx-lm or the other program cannot do,
    and DamagedError for files that are not sound.
    """

    name: str

    def is_adapter(self, folder: Path) -> bool:
        """Whether a folder holds the files of this format, and not those of mlx-lm."""
        ...

    def describe(self, folder: Path, sides: Mapping[str, tuple[int, int]]) -> DescribedAdapter:
        """Read an adapter for a base; sides: inputs and outputs of each linear module of it."""
        ...

    def import_adapter(self, folder: Path, out: Path, model: str) -> Conversion:
        """Convert an adapter of this format into a new folder for mlx-lm."""
        ...

    def export_adapter(self, folder: Path, out: Path, model: str | None = None) -> Conversion:
        """Convert an adapter of mlx-lm into a new folder of this format."""
        ...


def find_format(folder: Path) -> AdapterFormat | None:
    """The format of the adapter in a folder; None for one of mlx-lm, and for no adapter."""
    formats: Iterator[AdapterFormat] = (kind() for kind in seams.load_all("adapter_format"))
    return next((known for known in formats if known.is_adapter(folder)), None)


def load_peft_format(wanted: str) -> AdapterFormat:
    """PEFT's format; ConfigError where its room is not there. `wanted`: what asked for it."""
    adapter_format: AdapterFormat = seams.load_only("adapter_format", wanted)()
    return adapter_format
