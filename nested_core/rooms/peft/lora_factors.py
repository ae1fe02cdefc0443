"""The low-rank factors of each adapted module, as mlx-lm and as PEFT name and store them.

Tensors are transposed and renamed as bytes, without arithmetic. Every module must have both
matrices, of matching shapes and with finite values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nested_core.errors import DamagedError, list_first
from nested_core.models.lora_tensors import FACTOR_DTYPES, LORA_FACTORS
from nested_core.storage.safetensors_files import NUMPY_DTYPES, StoredTensor

MAX_SHOWN_PROBLEMS = 8
MAX_PROBLEM_CHARACTERS = 300


@dataclass(frozen=True)
class ModuleFactors:
    """One module's tensors as mlx-lm has them: lora_a (in, rank), lora_b (rank, out)."""

    lora_a: StoredTensor
    lora_b: StoredTensor

    @property
    def rank(self) -> int:
        """The inner dimension of the product."""
        return self.lora_a.shape[1]


@dataclass(frozen=True)
class TensorNaming:
    """How a program names a module's tensors, and whether it stores the matrices transposed."""

    prefix: str
    leaves: Mapping[str, str]
    is_transposed: bool

    def parse_tensor_name(self, name: str) -> tuple[str, str] | None:
        """A tensor's module and leaf (lora_a or lora_b); None if it is neither."""
        for leaf, suffix in self.leaves.items():
            module = name.removeprefix(self.prefix).removesuffix(suffix)
            if module and name == self.prefix + module + suffix:
                return module, leaf
        return None

    def tensor_name(self, module: str, leaf: str) -> str:
        """The tensor's name in the file."""
        return self.prefix + module + self.leaves[leaf]


# mlx_lm/tuner/lora.py.
MLX_LM_NAMING = TensorNaming("", {"lora_a": ".lora_a", "lora_b": ".lora_b"}, False)
# peft/tuners/lora/layer.py and utils/save_and_load.py, which drops the adapter's name; A is a
# Linear(in, r) and B a Linear(r, out), whose weights lie (out, in) in PyTorch.
PEFT_NAMING = TensorNaming(
    "base_model.model.", {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"}, True
)


def group_by_module(
    tensors: Mapping[str, StoredTensor], naming: TensorNaming, path: Path
) -> dict[str, ModuleFactors]:
    """The factors by module name, sorted; DamagedError names every tensor that does not belong."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    for name, tensor in sorted(tensors.items()):
        parsed = naming.parse_tensor_name(name)
        if parsed is None:
            problems.append(f"{name}: no tensor of a LoRA module")
            continue
        module, leaf = parsed
        modules.setdefault(module, {})[leaf] = transpose_as_stored(tensor, naming)
    for module, leaves in modules.items():
        problems += _module_problems(module, leaves, naming)
    if not modules:
        problems.append("no tensor at all")
    if problems:
        raise DamagedError(
            f"{path} does not hold a whole adapter as its configuration describes it:\n"
            + list_first_problems(problems)
        )
    return {module: ModuleFactors(**leaves) for module, leaves in modules.items()}


def name_tensors(
    modules: Mapping[str, ModuleFactors], naming: TensorNaming
) -> dict[str, StoredTensor]:
    """The tensors under the names that a program gives them; the inverse of `group_by_module`."""
    return {
        naming.tensor_name(module, leaf): transpose_as_stored(tensor, naming)
        for module, factors in modules.items()
        for leaf, tensor in vars(factors).items()
    }


def list_first_problems(problems: list[str]) -> str:
    """The first problems, one a line, and how many more there are.

    They hold names out of a stranger's file: nothing in them may steer a terminal.
    """
    escaped = map(_escape_unprintable, problems)
    return "\n".join(f"  {problem}" for problem in list_first(escaped, MAX_SHOWN_PROBLEMS))


def _escape_unprintable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_PROBLEM_CHARACTERS])


def transpose_as_stored(tensor: StoredTensor, naming: TensorNaming) -> StoredTensor:
    """The tensor, transposed if it is a matrix and the program stores matrices transposed."""
    if not naming.is_transposed or len(tensor.shape) != 2 or tensor.dtype not in FACTOR_DTYPES:
        return tensor
    values = np.frombuffer(tensor.data, NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape).T
    return StoredTensor(tensor.dtype, values.shape, values.tobytes())


def _module_problems(
    module: str, leaves: Mapping[str, StoredTensor], naming: TensorNaming
) -> list[str]:
    if missing := [leaf for leaf in LORA_FACTORS if leaf not in leaves]:
        return [f"{naming.tensor_name(module, leaf)}: missing" for leaf in missing]
    complaints = {leaf: _tensor_problem(leaf, leaves) for leaf in LORA_FACTORS}
    return [
        f"{naming.tensor_name(module, leaf)}: {complaint}"
        for leaf, complaint in complaints.items()
        if complaint is not None
    ]


def _tensor_problem(leaf: str, leaves: Mapping[str, StoredTensor]) -> str | None:
    """What is wrong with one tensor of a complete module, if anything."""
    tensor = leaves[leaf]
    if tensor.dtype not in FACTOR_DTYPES:
        return f"dtype {tensor.dtype}, expected one of {', '.join(FACTOR_DTYPES)}"
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        return f"a shape of {len(tensor.shape)} dimensions, {tensor.shape}, which no {leaf} has"
    if leaf == "lora_b" and tensor.shape[:1] != leaves["lora_a"].shape[1:]:
        return f"rank {tensor.shape[0]}, but {leaves['lora_a'].shape[1:]} in the other factor"
    if not np.isfinite(tensor.to_numpy()).all():
        return "holds values that are not finite"
    return None
