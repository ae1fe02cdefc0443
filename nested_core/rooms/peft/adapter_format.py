"""PEFT's format as the core and other rooms ask it."""

from __future__ import annotations

from pathlib import Path

from nested_core.models.adapter_formats import AdapterFormat
from nested_core.rooms.peft.conversion import PEFT_WEIGHTS, PICKLES, export_peft, import_peft
from nested_core.storage.adapter import WEIGHTS_NAME


def _is_adapter(folder: Path) -> bool:
    """Return whether a folder holds weights of PEFT, and none of mlx-lm."""
    has_weights = any((folder / name).exists() for name in (PEFT_WEIGHTS, *PICKLES))
    return has_weights and not (folder / WEIGHTS_NAME).exists()


PEFT = AdapterFormat("peft", _is_adapter, import_peft, export_peft)
