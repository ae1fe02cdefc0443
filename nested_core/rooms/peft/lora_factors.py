"""The low-rank factors of each adapted module, as PEFT names and stores them and as mlx-lm does.

Tensors are transposed and renamed as bytes, without arithmetic. PEFT's A is a Linear(in, r) and its
B a Linear(r, out), whose weights lie (out, in) in PyTorch (peft/tuners/lora/layer.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nested_core.errors import ConfigError, DamagedError, list_first
from nested_core.models.lora_tensors import FACTOR_DTYPES, LORA_FACTORS, leaf_name, module_name
from nested_core.storage.atomic import new_directory
from nested_core.storage.safetensors_files import NUMPY_DTYPES, StoredTensor

MAX_SHOWN_PROBLEMS = 8
MAX_PROBLEM_CHARACTERS = 300
PEFT_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
Tensors = dict[str, StoredTensor]


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
    problems = [
        f"{name}: {_find_problem(name, tensors, rank)}" for name in sorted(expected | {*tensors})
    ]
    problems = [problem for problem in problems if not problem.endswith(": None")]
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

    They hold names out of a stranger's file: nothing in them may steer a terminal.
    """
    escaped = (
        "".join(c if c.isprintable() else "?" for c in problem[:MAX_PROBLEM_CHARACTERS])
        for problem in problems
    )
    return "\n".join(f"  {problem}" for problem in list_first(escaped, MAX_SHOWN_PROBLEMS))


@contextmanager
def creating_adapter_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out`, which may exist only as an empty folder."""
    try:
        with new_directory(out) as folder:
            yield folder
            if out.is_dir():
                out.rmdir()
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}.") from error
