"""Adapters of PEFT, in and out, to the last bit: plain LoRA of one rank and one scale.

importing.py and exporting.py convert, peft_config.py and lora_factors.py know PEFT's format, and
adapter_format.py is what the core and other rooms ask.
"""

from nested_core.rooms.peft.exporting import export_peft
from nested_core.rooms.peft.importing import import_peft

__all__ = ["export_peft", "import_peft"]
