"""Adapters of other programs: PEFT's LoRA and DoRA, in and out, to the last bit.

importing.py and exporting.py convert, peft_config.py and lora_factors.py know PEFT's format, and
output_folder.py writes the result whole or not at all.
"""

from nested_core.models.peft.exporting import export_peft
from nested_core.models.peft.importing import import_peft
from nested_core.models.peft.output_folder import Conversion

__all__ = ["Conversion", "export_peft", "import_peft"]
