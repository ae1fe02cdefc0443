"""Adapters of PEFT made adapters of mlx-lm, and the other way round, to the last bit."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from nested_core.errors import ConfigError, DamagedError
from nested_core.measure.losses.left_out_examples import find_trained_rows, write_exported_rows
from nested_core.models.adapter_formats import AdapterFormat, Conversion
from nested_core.models.base_model import find_model_folder_offline, fingerprint_base_model
from nested_core.models.base_modules import BaseModules
from nested_core.models.lora_attachment import attach_stored_adapter
from nested_core.models.lora_tensors import module_name
from nested_core.pipeline.named_adapters import NamedAdapter
from nested_core.records.dataset import PromptFormat
from nested_core.registry.versions import PROVENANCE_NAME
from nested_core.rooms.peft.peft_format import (
    PeftConfig,
    Tensors,
    list_first_problems,
    list_modules,
    read_peft_config,
    remove_empty_folder,
    to_mlx_lm,
    to_peft,
)
from nested_core.storage.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    read_adapter,
    write_adapter,
)
from nested_core.storage.atomic import new_directory, write_json
from nested_core.storage.manifest import MANIFEST_NAME, verify_manifest
from nested_core.storage.output_places import require_absent_or_empty
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import read_header, read_tensors, save_arrays
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

LAYER_MODULE = re.compile(r"^\D+\.(?P<layer>\d+)\.(?P<key>.+)")
PEFT_WEIGHTS = "adapter_model.safetensors"
PICKLES = tuple(f"adapter_model.{ending}" for ending in ("bin", "pt", "pth", "pkl"))
# In names of tensors that PEFT saves beside the factors of linear modules (save_and_load.py)
FOREIGN_MARKS = re.compile(r"lora_embedding_|base_layer\.|\.bias$|modules_to_save|trainable_tokens")
EMBEDDING_PATTERN = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)$")


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
    with new_directory(out, confirm=partial(remove_empty_folder, out)) as temporary:
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
    problems += [f"{n}: has tensors, which PEFT would ignore" for n in modules if n not in targets]
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


def export_peft(folder: Path, out: Path, model: str | None = None) -> Conversion:
    """Convert the mlx-lm adapter in `folder` and write it to `out` for PEFT.

    `model` is what PEFT is to load as the base; by default the one in adapter_config.json. Raises
    ConfigError where PEFT has no such adapter, DamagedError where the files are not sound.
    """
    require_absent_or_empty(out, own_run=folder.parent)
    folder = Path(os.path.realpath(folder))  # once: the champion's link may be swapped meanwhile
    if (folder / MANIFEST_NAME).exists():
        verify_manifest(folder)
    adapter = read_adapter(folder, follow_links=True)
    parameters = adapter.config.get("lora_parameters") or {}
    modules = _list_modules(adapter, parameters.get("rank"))
    written = _make_peft_config(adapter, parameters, modules, model)
    notes = _compare_with_base(modules, written["base_model_name_or_path"])
    with new_directory(out, confirm=partial(remove_empty_folder, out)) as temporary:
        arrays = {name: own.to_mlx() for name, own in to_peft(adapter.tensors).items()}
        save_arrays(temporary / PEFT_WEIGHTS, arrays, metadata_format="pt")
        write_json(temporary / CONFIG_NAME, dict(sorted(written.items())))
        write_exported_rows(temporary, find_trained_rows(adapter, None))
        write_json(temporary / PROVENANCE_NAME, {"prompt_format": _read_prompt_format(folder)})
    strength = f"r {written['r']}, alpha {written['lora_alpha']:g}"
    return Conversion(out, written, len(modules), len(arrays), strength, tuple(notes))


def _compare_with_base(modules: list[str], base: str) -> list[str]:
    """Note names that could not be compared; ConfigError if the base has other modules.

    transformers knows modules by the names in the base's own files; mlx-lm renames some, such as
    transformer.h of GPT-2. PEFT attaches nothing to a name that it does not find, and only warns.
    """
    folder = find_model_folder_offline(base)
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    if not files:
        return [
            f"{base} is not on this machine: whether PEFT finds the adapter's modules in it was "
            f"not compared."
        ]
    names: set[str] = set()
    for file in files:
        with open_regular(file, UNBOUNDED, follow_links=True) as (opened, size):
            names.update(read_header(opened, size, file))
    strange = [module for module in modules if f"{module}.weight" not in names]
    if not strange:
        return []
    raise ConfigError(
        f"{len(strange)} of {len(modules)} modules that the adapter changes are called otherwise "
        f"in the files of {folder}, or are not in them: PEFT would attach nothing there. Give "
        f"--model the base that PEFT is to load; if it is this one, mlx-lm renames its modules, "
        f"and the adapter cannot be exported.\n" + list_first_problems(strange)
    )


def _list_modules(adapter: Adapter, rank: object) -> list[str]:
    """List the modules with factors, if all are LoRA of linear modules and of the rank said."""
    kind = adapter.config.get("fine_tune_type", "lora")
    problems = [] if kind == "lora" else [f"fine_tune_type {kind!r:.40}"]
    problems += [
        f"{name}: LoRA on an embedding or on expert layers"
        for name, tensor in sorted(adapter.tensors.items())
        if len(tensor.shape) > 2 or EMBEDDING_PATTERN.search(module_name(name))
    ]
    if problems:
        raise ConfigError(
            f"{adapter.path} holds what PEFT computes otherwise or has no like of, so nothing was "
            f"converted; `nested-tune export --fused DIR` writes a whole model:\n"
            + list_first_problems(problems)
        )
    return list_modules(adapter.tensors, rank, adapter.path / WEIGHTS_NAME)


def _make_peft_config(
    adapter: Adapter, parameters: dict[str, Any], modules: list[str], model: str | None
) -> dict[str, Any]:
    """Make adapter_config.json as PEFT reads it: scale is alpha / r there.

    parameters: the adapter's `lora_parameters`.
    """
    base = model or adapter.config.get("model")
    if base is None:
        raise ConfigError(
            f"{adapter.path}: adapter_config.json names no model. Give --model, the base that PEFT "
            f"is to load."
        )
    scale = parameters.get("scale")  # a finite number above 0, where the file has it
    if scale is None:
        raise ConfigError(
            f"{adapter.path}: adapter_config.json has scale None; lora_alpha would be scale * "
            f"rank, which must be a finite number above 0."
        )
    alpha = float(scale) * int(parameters["rank"])
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": parameters["rank"],
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": float(parameters.get("dropout") or 0.0),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "target_modules": modules,
    }


def _read_prompt_format(folder: Path) -> Any:
    """Return the recorded `prompt_format` of a version, or of a run's adapter; None of others."""
    runs = (RunDirectory(path) for path in folder.resolve().parents[:2])
    named = NamedAdapter(folder, run=next((run for run in runs if run.initial.is_dir()), None))
    return to_jsonable_python(PromptFormat.read(named.training_record))


def _is_adapter(folder: Path) -> bool:
    """Return whether a folder holds weights of PEFT, and none of mlx-lm."""
    has_weights = any((folder / name).exists() for name in (PEFT_WEIGHTS, *PICKLES))
    return has_weights and not (folder / WEIGHTS_NAME).exists()


PEFT = AdapterFormat("peft", _is_adapter, import_peft, export_peft)
