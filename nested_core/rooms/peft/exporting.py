"""An mlx-lm adapter directory to a PEFT adapter, bit for bit."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from nested_core.errors import ConfigError, DamagedError
from nested_core.measure.losses.left_out_examples import find_trained_rows, write_exported_rows
from nested_core.models.adapter_formats import Conversion
from nested_core.models.base_model import find_model_folder_offline
from nested_core.models.lora_tensors import module_name
from nested_core.pipeline.named_adapters import NamedAdapter
from nested_core.records.dataset import PromptFormat
from nested_core.registry.versions import PROVENANCE_NAME
from nested_core.rooms.peft.importing import PEFT_WEIGHTS
from nested_core.rooms.peft.lora_factors import (
    MLX_LM_NAMING,
    PEFT_NAMING,
    ModuleFactors,
    group_by_module,
    list_first_problems,
    name_tensors,
)
from nested_core.rooms.peft.output_folder import creating_adapter_folder
from nested_core.rooms.peft.peft_config import UNSUPPORTED_SETTING_REASONS
from nested_core.storage.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    read_adapter,
    require_adapter_directory,
)
from nested_core.storage.atomic import write_json
from nested_core.storage.manifest import MANIFEST_NAME, verify_manifest
from nested_core.storage.output_places import require_absent_or_empty
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import read_header, save_arrays
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

LAYER_MODULE_PATTERN = re.compile(r"(?P<stack>[^.]+\..+?)\.(?P<layer>\d+)\.(?P<key>.+)")
REASONS_BY_FINE_TUNE_TYPE = {
    "dora": UNSUPPORTED_SETTING_REASONS["use_dora"],
    "full": "whole weights and no low-rank factors",
}
EMBEDDING_PATTERN = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe)$")


def export_peft(folder: Path, out: Path, model: str | None = None) -> Conversion:
    """Convert the mlx-lm adapter in `folder` and write it to `out` for PEFT.

    `model` is what PEFT is to load as the base; by default the one in adapter_config.json. Raises
    ConfigError where PEFT has no such adapter, DamagedError where the files are not sound.
    """
    require_absent_or_empty(out, own_run=folder.parent)
    require_adapter_directory(folder)  # as it was given, before links are followed
    # Once: the champion's link may be swapped meanwhile.
    adapter = _read_mlx_lm_adapter(Path(os.path.realpath(folder)))
    prompt_format = _read_prompt_format(adapter.path)
    modules = _read_factors(adapter)
    written = _make_peft_config(adapter, modules, model)
    notes = _compare_with_base(modules, written["base_model_name_or_path"])
    tensors = name_tensors(modules, PEFT_NAMING)
    with creating_adapter_folder(out, own_run=folder.parent) as temporary:
        arrays = {name: tensor.to_mlx() for name, tensor in tensors.items()}
        save_arrays(temporary / PEFT_WEIGHTS, arrays, metadata_format="pt")
        write_json(temporary / CONFIG_NAME, dict(sorted(written.items())))
        write_exported_rows(temporary, find_trained_rows(adapter, None))
        write_json(temporary / PROVENANCE_NAME, {"prompt_format": prompt_format})
    strength = f"r {written['r']}, alpha {written['lora_alpha']:g}"
    return Conversion(out, written, len(modules), len(tensors), strength, tuple(notes))


def _compare_with_base(modules: Collection[str], base: str) -> list[str]:
    """Notes on names that could not be compared; ConfigError where the base has other modules.

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
    strange = [module for module in sorted(modules) if f"{module}.weight" not in names]
    if not strange:
        return []
    raise ConfigError(
        f"{len(strange)} of {len(modules)} modules that the adapter changes are called otherwise "
        f"in the files of {folder}, or are not in them: PEFT would attach nothing there. Give "
        f"--model the base that PEFT is to load; if it is this one, mlx-lm renames its modules, "
        f"and the adapter cannot be exported.\n" + list_first_problems(strange)
    )


def _read_mlx_lm_adapter(folder: Path) -> Adapter:
    """Read an adapter directory; a version of a registry or a checkpoint is re-hashed first."""
    if (folder / MANIFEST_NAME).exists():
        verify_manifest(folder)
    return read_adapter(folder, follow_links=True)


def _read_factors(adapter: Adapter) -> dict[str, ModuleFactors]:
    """The factors, if they are all LoRA of linear modules and of the rank that is said."""
    kind = adapter.config.get("fine_tune_type", "lora")
    if kind != "lora":
        unsupported = REASONS_BY_FINE_TUNE_TYPE.get(kind, "not known here")
        raise ConfigError(
            f"{adapter.path} holds fine_tune_type {kind!r:.40}: {unsupported}. Only lora becomes "
            f"an adapter of PEFT; `nested-tune export --fused DIR` writes a whole model."
        )
    problems = [
        f"{name}: {reason}"
        for name, tensor in sorted(adapter.tensors.items())
        if (reason := _describe_foreign_tensor(name, len(tensor.shape))) is not None
    ]
    if problems:
        raise ConfigError(
            f"{adapter.path} holds LoRA that PEFT has no like of, so nothing was converted:\n"
            + list_first_problems(problems)
        )
    path = adapter.path / WEIGHTS_NAME
    modules = group_by_module(adapter.tensors, MLX_LM_NAMING, path)
    ranks = {factors.rank for factors in modules.values()}
    rank = _lora_parameters(adapter).get("rank")
    if ranks != {rank}:
        raise DamagedError(
            f"{adapter.path}: adapter_config.json says rank {rank}, the tensors have "
            f"{sorted(ranks)}."
        )
    return modules


def _describe_foreign_tensor(name: str, dimensions: int) -> str | None:
    if dimensions > 2:
        return "factors of expert layers, which are separate modules in PEFT"
    if EMBEDDING_PATTERN.search(module_name(name)):
        return "LoRA on an embedding, which PEFT does not apply to a tied output layer"
    return None


def _lora_parameters(adapter: Adapter) -> dict[str, Any]:
    return adapter.config.get("lora_parameters") or {}


def _make_peft_config(
    adapter: Adapter, modules: Mapping[str, ModuleFactors], model: str | None
) -> dict[str, Any]:
    """adapter_config.json as PEFT reads it: scale is alpha / r there."""
    parameters = _lora_parameters(adapter)
    base = model or adapter.config.get("model")
    if base is None:
        raise ConfigError(
            f"{adapter.path}: adapter_config.json names no model. Give --model, the base that PEFT "
            f"is to load."
        )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": parameters["rank"],
        "lora_alpha": _compute_alpha(adapter),
        "lora_dropout": float(parameters.get("dropout") or 0.0),
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    } | _make_target_modules(modules)


def _compute_alpha(adapter: Adapter) -> float:
    """scale * rank, as a whole number where it is one; it must be finite and above 0."""
    parameters = _lora_parameters(adapter)
    scale = parameters.get("scale")
    alpha = 0.0 if scale is None else float(scale) * int(parameters["rank"])
    if not (0 < alpha < math.inf):
        raise ConfigError(
            f"{adapter.path}: adapter_config.json has scale {scale!r:.40}; lora_alpha would be "
            f"scale * rank, which must be a finite number above 0."
        )
    return int(alpha) if alpha.is_integer() else alpha


def _make_target_modules(modules: Collection[str]) -> dict[str, Any]:
    """Names within a layer and the layers, where each layer has the same; else all full names."""
    places = [LAYER_MODULE_PATTERN.fullmatch(module) for module in modules]
    found = [place.group("stack", "layer", "key") for place in places if place is not None]
    stacks = {stack for stack, _, _ in found}
    layers = sorted({int(layer) for _, layer, _ in found})
    keys = sorted({key for _, _, key in found})
    if len(stacks) == 1 and len(found) == len(modules) == len(layers) * len(keys):
        pattern = stacks.pop().rpartition(".")[2]
        return {"target_modules": keys, "layers_to_transform": layers, "layers_pattern": pattern}
    return {"target_modules": sorted(modules), "layers_to_transform": None, "layers_pattern": None}


def _read_prompt_format(folder: Path) -> Any:
    """Return the recorded `prompt_format` of a version, or of a run's adapter; None of others."""
    runs = (RunDirectory(path) for path in folder.resolve().parents[:2])
    named = NamedAdapter(folder, run=next((run for run in runs if run.initial.is_dir()), None))
    return to_jsonable_python(PromptFormat.read(named.training_record))
