"""A PEFT adapter to an mlx-lm adapter directory; what would not compute the same is refused.

The base model is opened without reading its weights: it says which modules there are and where;
mlx-lm itself has the last word on what fits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from nested_core.errors import ConfigError, DamagedError
from nested_core.models.base_model import find_model_folder, fingerprint_base_model
from nested_core.models.peft.lora_factors import (
    MLX_LM_NAMING,
    PEFT_NAMING,
    ModuleFactors,
    group_by_module,
    leaf_name,
    list_first_problems,
    make_rank_and_scale_uniform,
    name_tensors,
    note_half_precision_dora,
)
from nested_core.models.peft.output_folder import (
    Conversion,
    creating_adapter_folder,
)
from nested_core.models.peft.peft_config import (
    UNSUPPORTED_SETTING_REASONS,
    PeftConfig,
    read_peft_config,
)
from nested_core.storage.adapter import CONFIG_NAME, write_adapter
from nested_core.storage.output_places import require_absent_or_empty
from nested_core.storage.safetensors_files import StoredTensor, read_tensors


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
        attached = {name for name in added if leaf_name(name) in MLX_LM_NAMING.leaves}
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


PEFT_WEIGHTS = "adapter_model.safetensors"
PICKLE_FILE_NAMES = (
    "adapter_model.bin",
    "adapter_model.pt",
    "adapter_model.pth",
    "adapter_model.pkl",
)
# Tensors that PEFT saves beside the factors of linear modules (save_and_load.py).
UNSUPPORTED_TENSOR_REASONS = {
    "lora_embedding_": "LoRA on an embedding, which mlx-lm would apply to a tied output "
    "layer too, and PEFT does not",
    "base_layer.": "weights of the base; save with save_embedding_layers=False",
    "lora_A.bias": UNSUPPORTED_SETTING_REASONS["lora_bias"],
    "lora_B.bias": UNSUPPORTED_SETTING_REASONS["lora_bias"],
    "modules_to_save": UNSUPPORTED_SETTING_REASONS["modules_to_save"],
    "trainable_tokens": UNSUPPORTED_SETTING_REASONS["trainable_token_indices"],
}


def import_peft(folder: Path, out: Path, model: str) -> Conversion:
    """Convert the PEFT adapter in `folder` for the base `model` and write it to `out`.

    Raises ConfigError where mlx-lm cannot do what the adapter does, DamagedError where the files
    are not a sound adapter.
    """
    require_absent_or_empty(out)
    config, tensors = read_peft_adapter(folder)
    modules = group_by_module(
        tensors, PEFT_NAMING, has_magnitude=config.use_dora, path=folder / PEFT_WEIGHTS
    )
    _require_ranks(config, modules, folder)
    base = BaseModules.open(model)
    base.require_linear(modules)
    notes = _compare_tensors_with_targets(config, modules, base, folder) + note_half_precision_dora(
        modules
    )
    uniform = make_rank_and_scale_uniform(
        modules, {name: config.scale_of(name) for name in modules}
    )
    num_layers, keys = base.mlx_lm_layers_and_keys(modules)
    if set(keys) == set(modules):
        notes.append("keys hold full names: the modules are not the same ones in the last layers")
    parameters = {"rank": uniform.rank, "scale": uniform.scale, "dropout": config.lora_dropout}
    written: dict[str, Any] = {
        "model": model,
        "fine_tune_type": "dora" if config.use_dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": parameters | {"keys": keys},
        "base_fingerprint": fingerprint_base_model(base.folder),
    }
    converted = name_tensors(uniform.modules, MLX_LM_NAMING)
    with creating_adapter_folder(out) as temporary:
        arrays = {name: tensor.to_mlx() for name, tensor in converted.items()}
        write_adapter(temporary, arrays, written)
        base.require_attachable(temporary, converted)
    return Conversion(out, written, len(modules), len(converted), (*notes, *uniform.notes))


def read_peft_adapter(folder: Path) -> tuple[PeftConfig, dict[str, StoredTensor]]:
    """Configuration and tensors of a PEFT adapter; only safetensors are opened."""
    path = folder / PEFT_WEIGHTS
    pickles = [name for name in PICKLE_FILE_NAMES if (folder / name).exists()]
    if not pickles and not path.exists() and not (folder / CONFIG_NAME).exists():
        what = "holds no PEFT adapter" if folder.is_dir() else "is not a directory"
        raise ConfigError(
            f"{folder} {what}. Expected a local folder with {PEFT_WEIGHTS} and {CONFIG_NAME}, "
            f"as PEFT's save_pretrained writes it; fetch one of the hub first."
        )
    if pickles and not path.exists():
        raise DamagedError(
            f"{folder / pickles[0]} is a pickle, and reading one can run code: it is not opened. "
            f"Load it in PEFT where you trust it and save_pretrained(..., safe_serialization=True)."
        )
    config = read_peft_config(folder)
    tensors = read_tensors(path, follow_links=True)
    problems = [
        f"  {name:.150}: {reason}"
        for name in sorted(tensors)
        for mark, reason in UNSUPPORTED_TENSOR_REASONS.items()
        if mark in name
    ]
    if problems:
        raise ConfigError(
            f"{path} holds tensors that an mlx-lm adapter has no place for, so nothing was "
            f"converted:\n{list_first_problems(problems)}"
        )
    return config, tensors


def _require_ranks(config: PeftConfig, modules: Mapping[str, ModuleFactors], folder: Path) -> None:
    """The scale depends on the rank that the configuration says: it must be the tensors'."""
    problems = [
        f"  {name}: rank {factors.rank}, but {config.rank_of(name)} by r and rank_pattern"
        for name, factors in modules.items()
        if factors.rank != config.rank_of(name)
    ]
    if problems:
        raise DamagedError(
            f"The tensors in {folder} do not have the ranks of its adapter_config.json:\n"
            + list_first_problems(problems)
        )


def _compare_tensors_with_targets(
    config: PeftConfig, modules: Mapping[str, ModuleFactors], base: BaseModules, folder: Path
) -> list[str]:
    """The modules with tensors must be those that target_modules and the layers name."""
    targets = config.target_modules_of(base.linear_modules())
    if targets is None:
        return ["the targets are no plain lists of names: no pattern is run, the tensors decide"]
    problems = [f"  {name}: has no tensors" for name in sorted(targets - modules.keys())]
    problems += [
        f"  {name}: has tensors, which PEFT would ignore" for name in modules if name not in targets
    ]
    if problems:
        raise DamagedError(
            f"The tensors in {folder} are not those of target_modules, exclude_modules and "
            f"layers_to_transform in its adapter_config.json:\n{list_first_problems(problems)}"
        )
    return []
