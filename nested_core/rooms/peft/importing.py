"""A PEFT adapter to an mlx-lm adapter directory; what would not compute the same is refused.

The base model is opened without reading its weights: it says which modules there are and where;
mlx-lm itself has the last word on what fits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from nested_core.errors import ConfigError, DamagedError
from nested_core.models.adapter_formats import Conversion
from nested_core.models.base_model import fingerprint_base_model
from nested_core.models.base_modules import BaseModules
from nested_core.models.lora_tensors import LORA_FACTORS, leaf_name
from nested_core.rooms.peft.lora_factors import (
    MLX_LM_NAMING,
    PEFT_NAMING,
    ModuleFactors,
    group_by_module,
    list_first_problems,
    name_tensors,
)
from nested_core.rooms.peft.output_folder import creating_adapter_folder
from nested_core.rooms.peft.peft_config import (
    UNSUPPORTED_SETTING_REASONS,
    PeftConfig,
    read_peft_config,
)
from nested_core.storage.adapter import CONFIG_NAME, write_adapter
from nested_core.storage.output_places import require_absent_or_empty
from nested_core.storage.safetensors_files import StoredTensor, read_tensors

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
    modules = group_by_module(tensors, PEFT_NAMING, folder / PEFT_WEIGHTS)
    _require_ranks(config, modules, folder)
    base = BaseModules.open(model)
    _require_linear(base, modules)
    notes = _compare_tensors_with_targets(config, modules, base, folder)
    num_layers, keys = _find_layers_and_keys(base, modules)
    if set(keys) == set(modules):
        notes.append("keys hold full names: the modules are not the same ones in the last layers")
    parameters = {"rank": config.r, "scale": config.scale, "dropout": config.lora_dropout}
    written: dict[str, Any] = {
        "model": model,
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": parameters | {"keys": keys},
        "base_fingerprint": fingerprint_base_model(base.folder),
    }
    converted = name_tensors(modules, MLX_LM_NAMING)
    with creating_adapter_folder(out) as temporary:
        arrays = {name: tensor.to_mlx() for name, tensor in converted.items()}
        write_adapter(temporary, arrays, written)
        _require_attachable(base, temporary, converted)
    strength = f"rank {config.r}, scale {config.scale:g}"
    return Conversion(out, written, len(modules), len(converted), strength, tuple(notes))


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
        f"{name:.150}: {reason}"
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
        f"{name}: rank {factors.rank}, but r is {config.r}"
        for name, factors in modules.items()
        if factors.rank != config.r
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
    problems = [f"{name}: has no tensors" for name in sorted(targets - modules.keys())]
    problems += [
        f"{name}: has tensors, which PEFT would ignore" for name in modules if name not in targets
    ]
    if problems:
        raise DamagedError(
            f"The tensors in {folder} are not those of target_modules, exclude_modules and "
            f"layers_to_transform in its adapter_config.json:\n{list_first_problems(problems)}"
        )
    return []


def _require_linear(base: BaseModules, modules: Collection[str]) -> None:
    """Raise ConfigError unless every name is a linear module of the base."""
    strange = sorted(set(modules) - base.linear_modules())
    if not strange:
        return
    raise ConfigError(
        f"{len(strange)} of {len(modules)} modules that the adapter changes are no linear "
        f"modules of {base.folder}, as mlx-lm builds it: it is another base, or mlx-lm fuses, "
        f"ties or renames them. Give --model the base that the adapter was trained on.\n"
        + list_first_problems(strange)
    )


def _find_layers_and_keys(base: BaseModules, modules: Collection[str]) -> tuple[int, list[str]]:
    """mlx-lm's num_layers and keys that reach these modules and no others.

    Where they are the same ones in each of the last layers: that many, and names within a layer.
    Else mlx-lm takes full names as keys (linear_to_lora_layers), whatever num_layers is.
    """
    layers = base.network.layers
    indices = {id(layer): index for index, layer in enumerate(layers)}
    starts = {
        f"{name}.": indices[id(module)]
        for name, module in base.network.named_modules()
        if id(module) in indices
    }
    split = {_split_layer_and_name(module, starts) for module in modules}
    depths = sorted({depth for depth, _ in split})
    keys = sorted({key for _, key in split})
    is_grid = len(split) == len(depths) * len(keys) and -1 not in depths
    if is_grid and depths == list(range(len(layers) - len(depths), len(layers))):
        return len(depths), keys
    return len(layers), sorted(modules)


def _split_layer_and_name(module: str, starts: Mapping[str, int]) -> tuple[int, str]:
    """A module's layer and its name in there; layer -1 and the full name outside of all layers."""
    for start, depth in starts.items():
        if module.startswith(start):
            return depth, module.removeprefix(start)
    return -1, module


def _require_attachable(base: BaseModules, adapter: Path, tensors: Collection[str]) -> None:
    """Let mlx-lm attach the written adapter: it must take every tensor and miss none."""
    from mlx_lm.tuner.utils import load_adapters

    before = _list_parameters(base)
    try:
        load_adapters(base.network, str(adapter))
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).replace(str(adapter), "the adapter")
        raise ConfigError(
            f"The adapter does not fit {base.folder}; give --model the base that it was "
            f"trained on. mlx-lm says:\n{list_first_problems(reason.splitlines())}"
        ) from error
    added = _list_parameters(base) - before
    attached = {name for name in added if leaf_name(name) in LORA_FACTORS}
    if attached != set(tensors):
        strange = sorted(attached ^ set(tensors))
        raise ConfigError(
            f"mlx-lm attaches other tensors to {base.folder} than the adapter holds:\n"
            + list_first_problems(strange)
        )


def _list_parameters(base: BaseModules) -> set[str]:
    return set(dict(tree_flatten(base.network.parameters())))
