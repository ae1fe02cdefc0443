"""A PEFT adapter to an mlx-lm adapter directory; what would not compute the same is refused.

The base model is opened without reading its weights: it says which modules there are and where;
mlx-lm itself has the last word on what fits.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError, DamagedError
from nested_core.models.adapter_formats import Conversion
from nested_core.models.base_model import fingerprint_base_model
from nested_core.models.base_modules import BaseModules
from nested_core.models.lora_attachment import attach_stored_adapter
from nested_core.rooms.peft.lora_factors import (
    Tensors,
    creating_adapter_folder,
    list_first_problems,
    list_modules,
    to_mlx_lm,
)
from nested_core.rooms.peft.peft_config import PeftConfig, read_peft_config
from nested_core.storage.adapter import CONFIG_NAME, read_adapter, write_adapter
from nested_core.storage.output_places import require_absent_or_empty
from nested_core.storage.safetensors_files import read_tensors

LAYER_MODULE = re.compile(r"^\D+\.(?P<layer>\d+)\.(?P<key>.+)")
PEFT_WEIGHTS = "adapter_model.safetensors"
PICKLES = tuple(f"adapter_model.{ending}" for ending in ("bin", "pt", "pth", "pkl"))
# In names of tensors that PEFT saves beside the factors of linear modules (save_and_load.py)
FOREIGN_MARKS = re.compile(r"lora_embedding_|base_layer\.|\.bias$|modules_to_save|trainable_tokens")


def import_peft(folder: Path, out: Path, model: str) -> Conversion:
    """Convert the PEFT adapter in `folder` for the base `model` and write it to `out`.

    Raises ConfigError where mlx-lm cannot do what the adapter does, DamagedError where the files
    are not a sound adapter.
    """
    require_absent_or_empty(out)
    config, tensors = read_peft_adapter(folder)
    modules = list_modules(tensors, config.r, folder / PEFT_WEIGHTS)
    base = BaseModules.open(model)
    linear = base.linear_modules()
    if strange := [module for module in modules if module not in linear]:
        raise ConfigError(
            f"{len(strange)} of {len(modules)} modules that the adapter changes are no linear "
            f"modules of {base.folder}, as mlx-lm builds it: it is another base, or mlx-lm fuses, "
            f"ties or renames them. Give --model the base that the adapter was trained on.\n"
            + list_first_problems(strange)
        )
    notes = _compare_with_targets(config, modules, linear, folder)
    num_layers, keys = _find_layers_and_keys(len(base.network.layers), modules)
    if keys == modules:
        notes.append("keys hold full names: the modules are not the same ones in the last layers")
    parameters = {"rank": config.r, "scale": config.scale, "dropout": config.lora_dropout}
    written: dict[str, Any] = {
        "model": model,
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": parameters | {"keys": keys},
        "base_fingerprint": fingerprint_base_model(base.folder),
    }
    with creating_adapter_folder(out) as temporary:
        write_adapter(temporary, {name: own.to_mlx() for name, own in tensors.items()}, written)
        attach_stored_adapter(base.network, read_adapter(temporary))  # ConfigError if it cannot
    strength = f"rank {config.r}, scale {config.scale:g}"
    return Conversion(out, written, len(modules), len(tensors), strength, tuple(notes))


def read_peft_adapter(folder: Path) -> tuple[PeftConfig, Tensors]:
    """Read a PEFT adapter's configuration, and its tensors as mlx-lm has them.

    Only safetensors are opened.
    """
    path = folder / PEFT_WEIGHTS
    pickles = [name for name in PICKLES if (folder / name).exists()]
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
    if foreign := [name for name in sorted(tensors) if FOREIGN_MARKS.search(name)]:
        raise ConfigError(
            f"{path} holds tensors that an mlx-lm adapter has no place for, so nothing was "
            f"converted; weights of the base go where save_embedding_layers=False:\n"
            + list_first_problems(foreign)
        )
    return config, to_mlx_lm(tensors)


def _compare_with_targets(
    config: PeftConfig, modules: list[str], linear: set[str], folder: Path
) -> list[str]:
    """Return a note if they are not compared; DamagedError if others are targets than have tensors.

    modules: those with tensors. linear: the base's.
    """
    targets = config.target_modules_of(linear)
    if targets is None:
        return ["the targets are no plain lists of names: no pattern is run, the tensors decide"]
    problems = [f"{name}: has no tensors" for name in sorted(targets - {*modules})]
    problems += [
        f"{name}: has tensors, which PEFT would ignore" for name in modules if name not in targets
    ]
    if problems:
        raise DamagedError(
            f"The tensors in {folder} are not those of target_modules, exclude_modules and "
            f"layers_to_transform in its adapter_config.json:\n{list_first_problems(problems)}"
        )
    return []


def _find_layers_and_keys(layers: int, modules: list[str]) -> tuple[int, list[str]]:
    """Find mlx-lm's num_layers and keys that reach these modules and no others.

    Where they are the same ones in each of the last layers: that many, and names within a layer.
    Else mlx-lm takes full names as keys (linear_to_lora_layers), whatever num_layers is.
    """
    parsed = [LAYER_MODULE.fullmatch(module) for module in modules]
    found = {(int(one["layer"]), one["key"]) for one in parsed if one is not None}
    depths = sorted({depth for depth, _ in found})
    keys = sorted({key for _, key in found})
    is_grid = len(found) == len(modules) == len(depths) * len(keys)
    if is_grid and depths == list(range(layers - len(depths), layers)):
        return len(depths), keys
    return layers, modules
