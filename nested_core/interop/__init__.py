"""Adapters of other programs: PEFT's LoRA and DoRA, in and out, to the last bit."""

from nested_core.interop.exporting import export_peft
from nested_core.interop.folders import Conversion
from nested_core.interop.importing import import_peft

__all__ = ["Conversion", "export_peft", "import_peft"]
