"""PEFT's format as the core and other rooms ask it."""

from __future__ import annotations

from pathlib import Path

from nested_core.models.adapter_formats import Conversion
from nested_core.rooms.peft.exporting import export_peft
from nested_core.rooms.peft.importing import PEFT_WEIGHTS, PICKLES, import_peft
from nested_core.storage.adapter import WEIGHTS_NAME


class PeftFormat:
    """AdapterFormat (nested_core/models/adapter_formats.py) for PEFT."""

    name = "peft"

    def is_adapter(self, folder: Path) -> bool:
        """Whether a folder holds weights of PEFT, and none of mlx-lm."""
        has_weights = any((folder / name).exists() for name in (PEFT_WEIGHTS, *PICKLES))
        return has_weights and not (folder / WEIGHTS_NAME).exists()

    def import_adapter(self, folder: Path, out: Path, model: str) -> Conversion:
        """Convert an adapter of PEFT into a new folder for mlx-lm."""
        return import_peft(folder, out, model)

    def export_adapter(self, folder: Path, out: Path, model: str | None = None) -> Conversion:
        """Convert an adapter of mlx-lm into a new folder for PEFT."""
        return export_peft(folder, out, model)
