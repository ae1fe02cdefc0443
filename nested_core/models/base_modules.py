"""Open a base model to inspect its modules, without reading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn

from nested_core.models.base_model import find_model_folder, naming_unloadable_model


@dataclass(frozen=True)
class BaseModules:
    """A model whose arrays are not evaluated, and the folder that it was opened from."""

    folder: Path
    network: nn.Module

    @classmethod
    def open(cls, model: str) -> BaseModules:
        """Open a local folder or a hub repository; ConfigError if the model cannot be loaded."""
        from mlx_lm.utils import load_model

        folder = find_model_folder(model)
        with naming_unloadable_model(folder):
            network, _ = load_model(folder, lazy=True)
        return cls(folder, network)

    def linear_modules(self) -> set[str]:
        """Return the names of the linear modules, quantized or not."""
        linear = (nn.Linear, nn.QuantizedLinear)
        return {name for name, module in self.network.named_modules() if isinstance(module, linear)}
