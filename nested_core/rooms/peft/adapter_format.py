"""PEFT's format as the core and other rooms ask it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nested_core.models.adapter_formats import Conversion, DescribedAdapter
from nested_core.models.lora_tensors import module_name
from nested_core.rooms.peft.exporting import export_peft
from nested_core.rooms.peft.importing import PEFT_WEIGHTS, PICKLES, import_peft, read_peft_adapter
from nested_core.storage.adapter import WEIGHTS_NAME


class PeftFormat:
    """AdapterFormat (nested_core/models/adapter_formats.py) for PEFT."""

    name = "peft"

    def is_adapter(self, folder: Path) -> bool:
        """Whether a folder holds weights of PEFT, and none of mlx-lm."""
        has_weights = any((folder / name).exists() for name in (PEFT_WEIGHTS, *PICKLES))
        return has_weights and not (folder / WEIGHTS_NAME).exists()

    def describe(self, folder: Path, sides: Mapping[str, tuple[int, int]]) -> DescribedAdapter:
        """Read an adapter for a base; sides: inputs and outputs of each linear module of it."""
        config, tensors = read_peft_adapter(folder)
        targets = config.target_modules_of(sides)
        if targets is None:  # patterns of a stranger are not run: the tensors decide
            targets = {module_name(name) for name in tensors} & sides.keys()
        expected = {}
        for module in targets:
            inputs, outputs = sides[module]
            expected[f"{module}.lora_a"] = (inputs, config.r)
            expected[f"{module}.lora_b"] = (config.r, outputs)
        listed = config.target_modules if isinstance(config.target_modules, list) else []
        unmatched = tuple(
            key
            for key in listed
            if not any(name == key or name.endswith(f".{key}") for name in sides)
        )
        scales = dict.fromkeys(targets, config.scale)
        return DescribedAdapter(config.model_dump(), tensors, expected, scales, unmatched)

    def import_adapter(self, folder: Path, out: Path, model: str) -> Conversion:
        """Convert an adapter of PEFT into a new folder for mlx-lm."""
        return import_peft(folder, out, model)

    def export_adapter(self, folder: Path, out: Path, model: str | None = None) -> Conversion:
        """Convert an adapter of mlx-lm into a new folder for PEFT."""
        return export_peft(folder, out, model)
