"""PEFT's format: adapter_config.json and the low-rank factors of each adapted module.

Keys and defaults are those of peft/config.py and peft/tuners/lora/config.py. A key that would
change the model and has no counterpart in mlx-lm is refused by name; so is one not known here.
Tensors are transposed and renamed as bytes, without arithmetic. PEFT's A is a Linear(in, r) and its
B a Linear(r, out), whose weights lie (out, in) in PyTorch (peft/tuners/lora/layer.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from nested_core.errors import ConfigError, DamagedError, list_first, naming_damaged_file, shorten
from nested_core.models.lora_tensors import FACTOR_DTYPES, LORA_FACTORS, leaf_name, module_name
from nested_core.storage.adapter import CONFIG_NAME, read_adapter_config
from nested_core.storage.safetensors_files import NUMPY_DTYPES, StoredTensor

NEUTRAL: tuple[Any, ...] = (None, False, "none", [], {})
# They do not change what a trained adapter computes.
IGNORED_SETTINGS = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
# The others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) change the base, which the adapter then needs.
INITS_KEEPING_THE_BASE = (None, True, False, "gaussian", "orthogonal", "eva")
Rank = Annotated[int, Field(gt=0, le=65_536)]  # as in adapter_config.json of mlx-lm
Layers = list[int] | int
MAX_SHOWN_PROBLEMS = 8
MAX_PROBLEM_CHARACTERS = 300
PEFT_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
Tensors = dict[str, StoredTensor]


class PeftConfig(BaseModel):
    """The keys of a LoRA configuration of PEFT that decide what the adapter computes."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)

    peft_type: str
    r: Rank
    lora_alpha: PositiveFloat
    task_type: str | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: Layers | None = None
    layers_pattern: list[str] | str | None = None

    @property
    def scale(self) -> float:
        """The factor on B A x: alpha / r, or alpha / sqrt(r) (LoraLayer.update_layer)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def target_modules_of(self, names: Iterable[str]) -> set[str] | None:
        """Name the base's linear modules that PEFT would adapt (check_target_module_exists).

        None if the configuration holds a regular expression: those of a stranger are not run.
        """
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else None
        patterns = patterns or list(self.layers_pattern or [])
        is_plain = all(re.fullmatch(r"\w+", pattern) for pattern in patterns)
        excluded = self.exclude_modules or []
        if isinstance(self.target_modules, str | None) or isinstance(excluded, str) or not is_plain:
            return None
        exact, kept = frozenset(self.target_modules), frozenset(excluded)
        return {
            name
            for name in names
            if not _ends_with_any(name, kept)
            and (
                name in exact
                or (_ends_with_any(name, exact) and self._is_in_layers(name, patterns))
            )
        }

    def _is_in_layers(self, name: str, patterns: list[str]) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        parts = name.split(".")
        for place in range(1 if patterns else 2, len(parts) - 1):
            if parts[place].isdigit() and (not patterns or parts[place - 1] in patterns):
                return int(parts[place]) in (layers if isinstance(layers, list) else [layers])
        return False


def _ends_with_any(name: str, endings: frozenset[str]) -> bool:
    """Return whether the name, or what follows one of its dots, is among the endings."""
    parts = name.split(".")
    return any(".".join(parts[start:]) in endings for start in range(len(parts)))


def read_peft_config(folder: Path) -> PeftConfig:
    """Read the configuration in a PEFT adapter's folder.

    Raises DamagedError if it is malformed, and ConfigError, with all reasons, if mlx-lm cannot
    compute what it describes.
    """
    path = folder / CONFIG_NAME
    values = read_adapter_config(path, follow_links=True)
    if "peft_type" not in values:
        raise ConfigError(
            f"{path} has no peft_type: it is not a PEFT adapter's configuration. Give the folder "
            f"that PEFT's save_pretrained wrote."
        )
    with naming_damaged_file(path):
        config = PeftConfig.model_validate(values)
    if problems := _unsupported_settings(config):
        raise ConfigError(
            f"{path} describes an adapter that mlx-lm cannot carry out, so nothing was "
            f"converted:\n{list_first_problems(problems)}"
        )
    return config


def _unsupported_settings(config: PeftConfig) -> list[str]:
    """List the keys that mlx-lm's plain LoRA has no like of, and those that are not known here."""
    problems = []
    if config.peft_type != "LORA":
        problems.append(f"peft_type: {config.peft_type!r:.40}, expected 'LORA'")
    if config.task_type not in (None, "CAUSAL_LM"):
        problems.append(f"task_type: {config.task_type!r:.40}, expected 'CAUSAL_LM'")
    if config.init_lora_weights not in INITS_KEEPING_THE_BASE:
        problems.append(
            f"init_lora_weights: {config.init_lora_weights!r:.40} changes the base model; save "
            f"it with PEFT's path_initial_model_for_weight_conversion first"
        )
    problems += [
        f"{key:.40}: {value!r:.40}, and plain LoRA of one rank and one scale has none"
        for key, value in (config.model_extra or {}).items()
        if key not in IGNORED_SETTINGS and value not in NEUTRAL
    ]
    return problems


def to_mlx_lm(tensors: Mapping[str, StoredTensor]) -> Tensors:
    """Return tensors of PEFT as mlx-lm has them; any that is no factor under its name in quotes."""
    converted = {}
    for name, tensor in tensors.items():
        if (parsed := PEFT_NAME.fullmatch(name)) is None:
            converted[repr(name)] = tensor
        else:
            converted[f"{parsed[1]}.lora_{parsed[2].lower()}"] = _transpose(tensor)
    return converted


def to_peft(tensors: Mapping[str, StoredTensor]) -> Tensors:
    """Return factors of mlx-lm as PEFT has them."""
    return {
        f"base_model.model.{module_name(name)}.lora_{name[-1].upper()}.weight": _transpose(tensor)
        for name, tensor in tensors.items()
    }


def _transpose(tensor: StoredTensor) -> StoredTensor:
    """Transpose a matrix of floating-point numbers; any other tensor stays as it is."""
    if len(tensor.shape) != 2 or tensor.dtype not in FACTOR_DTYPES:
        return tensor
    values = np.frombuffer(tensor.data, NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape).T
    return StoredTensor(tensor.dtype, values.shape, values.tobytes())


def list_modules(tensors: Mapping[str, StoredTensor], rank: object, path: Path) -> list[str]:
    """List the modules whose factors, as mlx-lm names them, are in the file `path`.

    Each has to have both, of this rank, in a known dtype and finite: DamagedError names every
    tensor that does not belong.
    """
    modules = sorted({module_name(name) for name in tensors if leaf_name(name) in LORA_FACTORS})
    expected = {f"{module}.{leaf}" for module in modules for leaf in LORA_FACTORS}
    found = {name: _find_problem(name, tensors, rank) for name in sorted(expected | {*tensors})}
    problems = [f"{name}: {problem}" for name, problem in found.items() if problem is not None]
    if not modules:
        problems.append("no tensor at all")
    if problems:
        raise DamagedError(
            f"{path} does not hold a whole adapter as its configuration describes it:\n"
            + list_first_problems(problems)
        )
    return modules


def _find_problem(name: str, tensors: Mapping[str, StoredTensor], rank: object) -> str | None:
    """Find what is wrong with one tensor, if anything."""
    if leaf_name(name) not in LORA_FACTORS:
        return "no tensor of a LoRA module"
    if (tensor := tensors.get(name)) is None:
        return "missing"
    if tensor.dtype not in FACTOR_DTYPES:
        return f"dtype {tensor.dtype}, expected one of {', '.join(FACTOR_DTYPES)}"
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        return f"a shape of {len(tensor.shape)} dimensions, {tensor.shape}, which no factor has"
    axis = 1 if leaf_name(name) == "lora_a" else 0
    if tensor.shape[axis] != rank:
        return f"rank {tensor.shape[axis]}, but adapter_config.json says {rank}"
    if not np.isfinite(tensor.to_numpy()).all():
        return "holds values that are not finite"
    return None


def list_first_problems(problems: list[str]) -> str:
    """List the first problems, one a line, and how many more there are.

    They hold names out of a stranger's file, with any line ends.
    """
    lines = (shorten(problem, MAX_PROBLEM_CHARACTERS) for problem in problems)
    return "\n".join(f"  {line}" for line in list_first(lines, MAX_SHOWN_PROBLEMS))


def remove_empty_folder(folder: Path) -> None:
    """Make room for a new folder, where there is an empty one; OSError for one that is not."""
    if folder.is_dir():
        folder.rmdir()
