"""Adapters of other programs: PEFT's LoRA and DoRA, in and out, to the last bit."""

from nested_core.models.peft.exporting import export_peft
from nested_core.models.peft.importing import import_peft
from nested_core.models.peft.output_folder import Conversion

__all__ = ["Conversion", "export_peft", "import_peft"]
