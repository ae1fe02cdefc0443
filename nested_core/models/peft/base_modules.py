"""The base model that an adapter is made for, opened without reading its weights.

It says which modules there are and where; mlx-lm itself has the last word on what fits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
from mlx.utils import tree_flatten

from nested_core.errors import ConfigError
from nested_core.models.base_model import find_model_folder
from nested_core.models.peft.lora_factors import MLX_LM_NAMING, list_first_problems


@dataclass(frozen=True)
class BaseModules:
    """A model whose arrays are not evaluated, and its folder."""

    folder: Path
    network: nn.Module

    @classmethod
    def open(cls, model: str) -> BaseModules:
        """Open a local folder or a repository of the hub."""
        from mlx_lm.utils import load_model

        folder = find_model_folder(model)
        try:
            network, _ = load_model(folder, lazy=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ConfigError(f"model: {folder} could not be loaded: {error}") from error
        return cls(folder, network)

    def linear_modules(self) -> set[str]:
        """The names of the modules that take LoRA as PEFT's Linear does."""
        kinds = (nn.Linear, nn.QuantizedLinear)
        return {name for name, module in self.network.named_modules() if isinstance(module, kinds)}

    def require_linear(self, modules: Collection[str]) -> None:
        """Raise ConfigError unless every name is a linear module of this model."""
        strange = sorted(set(modules) - self.linear_modules())
        if not strange:
            return
        raise ConfigError(
            f"{len(strange)} of {len(modules)} modules that the adapter changes are no linear "
            f"modules of {self.folder}, as mlx-lm builds it: it is another base, or mlx-lm fuses, "
            f"ties or renames them. Give --model the base that the adapter was trained on.\n"
            + list_first_problems([f"  {name}" for name in strange])
        )

    def mlx_lm_layers_and_keys(self, modules: Collection[str]) -> tuple[int, list[str]]:
        """mlx-lm's num_layers and keys that reach these modules and no others.

        Where they are the same ones in each of the last layers: that many, and names within a
        layer. Else mlx-lm takes full names as keys (linear_to_lora_layers), whatever num_layers is.
        """
        layers = self.network.layers
        known = {id(layer): index for index, layer in enumerate(layers)}
        starts = {
            f"{name}.": known[id(module)]
            for name, module in self.network.named_modules()
            if id(module) in known
        }
        places = {_split_layer_and_name(module, starts) for module in modules}
        depths = sorted({depth for depth, _ in places})
        keys = sorted({key for _, key in places})
        is_grid = len(places) == len(depths) * len(keys) and -1 not in depths
        if is_grid and depths == list(range(len(layers) - len(depths), len(layers))):
            return len(depths), keys
        return len(layers), sorted(modules)

    def require_attachable(self, adapter: Path, tensors: Collection[str]) -> None:
        """Let mlx-lm attach the written adapter: it must take every tensor and miss none."""
        from mlx_lm.tuner.utils import load_adapters

        before = self._module_names()
        try:
            load_adapters(self.network, str(adapter))
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).replace(str(adapter), "the adapter")
            raise ConfigError(
                f"The adapter does not fit {self.folder}; give --model the base that it was "
                f"trained on. mlx-lm says:\n{list_first_problems(reason.splitlines())}"
            ) from error
        added = self._module_names() - before
        attached = {name for name in added if name.rpartition(".")[2] in MLX_LM_NAMING.leaves}
        if attached != set(tensors):
            strange = sorted(attached ^ set(tensors))
            raise ConfigError(
                f"mlx-lm attaches other tensors to {self.folder} than the adapter holds:\n"
                + list_first_problems([f"  {name}" for name in strange])
            )

    def _module_names(self) -> set[str]:
        return set(dict(tree_flatten(self.network.parameters())))


def _split_layer_and_name(module: str, starts: dict[str, int]) -> tuple[int, str]:
    """A module's layer and its name in there; layer -1 and the full name outside of all layers."""
    for start, depth in starts.items():
        if module.startswith(start):
            return depth, module.removeprefix(start)
    return -1, module
