"""Adapters of PEFT, in and out, to the last bit: plain LoRA of one rank and one scale.

conversion.py converts both ways, and peft_format.py knows PEFT's format.
"""

from nested_core.rooms.peft.conversion import export_peft, import_peft

__all__ = ["export_peft", "import_peft"]
