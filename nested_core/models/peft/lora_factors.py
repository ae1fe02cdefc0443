"""The low-rank factors of each adapted module, as mlx-lm and as PEFT name and store them.

Tensors are transposed and renamed as bytes, without arithmetic. Every module must have both
matrices (and DoRA's magnitude, for DoRA), of matching shapes and with finite values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nested_core.errors import ConfigError, DamagedError
from nested_core.storage.safetensors_files import NUMPY_DTYPES, StoredTensor

LORA_FACTORS = ("lora_a", "lora_b")
FACTOR_DTYPES = ("F32", "F16", "BF16")
MAX_SHOWN_PROBLEMS = 8
MAX_PROBLEM_CHARACTERS = 300


@dataclass(frozen=True)
class ModuleFactors:
    """One module's tensors as mlx-lm has them: lora_a (in, rank), lora_b (rank, out), m (out)."""

    lora_a: StoredTensor
    lora_b: StoredTensor
    m: StoredTensor | None = None

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
        """A tensor's module and leaf (lora_a, lora_b or m); None where it is neither."""
        for leaf, suffix in self.leaves.items():
            module = name.removeprefix(self.prefix).removesuffix(suffix)
            if module and name == self.prefix + module + suffix:
                return module, leaf
        return None

    def tensor_name(self, module: str, leaf: str) -> str:
        """The tensor's name in the file."""
        return self.prefix + module + self.leaves[leaf]


# mlx_lm/tuner/lora.py and dora.py.
MLX_LM_NAMING = TensorNaming("", {"lora_a": ".lora_a", "lora_b": ".lora_b", "m": ".m"}, False)
# peft/tuners/lora/layer.py and utils/save_and_load.py, which drops the adapter's name; A is a
# Linear(in, r) and B a Linear(r, out), whose weights lie (out, in) in PyTorch.
PEFT_NAMING = TensorNaming(
    "base_model.model.",
    {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight", "m": ".lora_magnitude_vector"},
    True,
)


def module_name(tensor: str) -> str:
    """The module that a tensor of this dotted name belongs to; "" where the name has no dot."""
    return tensor.rpartition(".")[0]


def leaf_name(tensor: str) -> str:
    """The last part of a tensor's dotted name, which says what it is of its module."""
    return tensor.rpartition(".")[2]


def group_by_module(
    tensors: Mapping[str, StoredTensor], naming: TensorNaming, *, has_magnitude: bool, path: Path
) -> dict[str, ModuleFactors]:
    """The factors by module name, sorted; DamagedError names every tensor that does not belong."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    for name, tensor in sorted(tensors.items()):
        place = naming.parse_tensor_name(name)
        if place is None:
            problems.append(f"  {name}: no tensor of a LoRA or DoRA module")
            continue
        module, leaf = place
        modules.setdefault(module, {})[leaf] = transpose_as_stored(tensor, naming)
    wanted = (*LORA_FACTORS, "m") if has_magnitude else LORA_FACTORS
    for module, leaves in modules.items():
        problems += _module_problems(module, leaves, wanted, naming)
    if not modules:
        problems.append("  no tensor at all")
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
        if tensor is not None
    }


def note_half_precision_dora(modules: Mapping[str, ModuleFactors]) -> list[str]:
    """A note on DoRA in half precision, which the two programs compute differently."""
    magnitudes = [factors for factors in modules.values() if factors.m is not None]
    if all(tensor.dtype == "F32" for factors in magnitudes for tensor in vars(factors).values()):
        return []
    return [
        "DoRA in half precision: mlx-lm computes the rows' norms in it, PEFT lifts the adapter to "
        "float32 first, so that their answers differ in the third digit"
    ]


def list_first_problems(problems: list[str]) -> str:
    """The first problems, one a line, and how many more there are.

    They hold names out of a stranger's file: nothing in them may steer a terminal.
    """
    shown = [_escape_unprintable(problem) for problem in problems[:MAX_SHOWN_PROBLEMS]]
    more = len(problems) - MAX_SHOWN_PROBLEMS
    return "\n".join(shown + ([f"  and {more} more"] if more > 0 else []))


def _escape_unprintable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_PROBLEM_CHARACTERS])


def transpose_as_stored(tensor: StoredTensor, naming: TensorNaming) -> StoredTensor:
    """The tensor, transposed if it is a matrix and the program stores matrices transposed."""
    if not naming.is_transposed or len(tensor.shape) != 2 or tensor.dtype not in FACTOR_DTYPES:
        return tensor
    values = np.frombuffer(tensor.data, NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape).T
    return StoredTensor(tensor.dtype, values.shape, values.tobytes())


def _module_problems(
    module: str, leaves: Mapping[str, StoredTensor], wanted: tuple[str, ...], naming: TensorNaming
) -> list[str]:
    missing = [leaf for leaf in wanted if leaf not in leaves]
    foreign = [leaf for leaf in leaves if leaf not in wanted]
    if missing or foreign:
        found = [f"  {naming.tensor_name(module, leaf)}: missing" for leaf in missing]
        return found + [
            f"  {naming.tensor_name(module, leaf)}: unexpected, the configuration is not DoRA's"
            for leaf in foreign
        ]
    complaints = {leaf: _tensor_problem(leaf, leaves) for leaf in wanted}
    return [
        f"  {naming.tensor_name(module, leaf)}: {complaint}"
        for leaf, complaint in complaints.items()
        if complaint is not None
    ]


def _tensor_problem(leaf: str, leaves: Mapping[str, StoredTensor]) -> str | None:
    """What is wrong with one tensor of a complete module, if anything."""
    tensor = leaves[leaf]
    if tensor.dtype not in FACTOR_DTYPES:
        return f"dtype {tensor.dtype}, expected one of {', '.join(FACTOR_DTYPES)}"
    if len(tensor.shape) != (1 if leaf == "m" else 2) or 0 in tensor.shape:
        return f"a shape of {len(tensor.shape)} dimensions, {tensor.shape}, which no {leaf} has"
    if leaf == "lora_b" and tensor.shape[:1] != leaves["lora_a"].shape[1:]:
        return f"rank {tensor.shape[0]}, but {leaves['lora_a'].shape[1:]} in the other factor"
    if leaf == "m" and tensor.shape != leaves["lora_b"].shape[1:]:
        return f"{tensor.shape[0]} rows, but the module has {leaves['lora_b'].shape[1:]}"
    if not np.isfinite(tensor.to_numpy()).all():
        return "holds values that are not finite"
    return None


@dataclass(frozen=True)
class SameRankFactors:
    """Factors that share a rank and a scale, and notes on what was changed for that."""

    modules: dict[str, ModuleFactors]
    rank: int
    scale: float
    notes: tuple[str, ...]


def make_rank_and_scale_uniform(
    modules: Mapping[str, ModuleFactors], scales: Mapping[str, float]
) -> SameRankFactors:
    """Give every module the highest rank and the most common scale.

    Raises ConfigError if a scale cannot be multiplied into lora_b exactly.
    """
    rank = max(factors.rank for factors in modules.values())
    scale = Counter(scales.values()).most_common(1)[0][0]
    padded = [name for name, factors in modules.items() if factors.rank < rank]
    rescaled = [name for name in modules if scales[name] != scale]
    notes = []
    if padded:
        notes.append(
            f"{len(padded)} of {len(modules)} modules have a rank below {rank}: filled up with "
            f"zeros, which changes no product (mlx-lm has one rank for all)"
        )
    if rescaled:
        notes.append(
            f"{len(rescaled)} of {len(modules)} modules have another scale than {scale:g}: lora_b "
            f"is multiplied by a power of two, without rounding (mlx-lm has one scale for all)"
        )
    uniform = {
        name: _pad_rank(_move_scale_into_lora_b(name, factors, scales[name], scale), rank)
        for name, factors in modules.items()
    }
    return SameRankFactors(uniform, rank, scale, tuple(notes))


def _pad_rank(factors: ModuleFactors, rank: int) -> ModuleFactors:
    """Pad lora_a with zero columns and lora_b with zero rows; the product stays the same."""
    missing = rank - factors.rank
    if not missing:
        return factors
    return replace(
        factors,
        lora_a=_pad_with_zeros(factors.lora_a, columns=missing),
        lora_b=_pad_with_zeros(factors.lora_b, rows=missing),
    )


def _pad_with_zeros(tensor: StoredTensor, *, rows: int = 0, columns: int = 0) -> StoredTensor:
    stored = np.frombuffer(tensor.data, NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape)
    wider = np.pad(stored, ((0, rows), (0, columns)))
    return StoredTensor(tensor.dtype, wider.shape, wider.tobytes())


def _move_scale_into_lora_b(
    name: str, factors: ModuleFactors, own: float, common: float
) -> ModuleFactors:
    """Put own / common into lora_b: exact for a power of two that keeps every value in range."""
    if own == common:
        return factors
    ratio = own / common
    values = factors.lora_b.to_numpy().astype(np.float64) * ratio
    narrowed = _cast_to_stored_dtype(values, factors.lora_b.dtype)
    is_power_of_two = math.frexp(ratio)[0] == 0.5 and ratio * common == own
    if not is_power_of_two or not np.array_equal(narrowed.to_numpy(), values):
        raise ConfigError(
            f"{name} has the scale {own:g} and most modules have {common:g} (lora_alpha, "
            f"alpha_pattern, rank_pattern). mlx-lm has one scale for all, and {own:g} / "
            f"{common:g} cannot be put into lora_b without rounding; only powers of two can. Train "
            f"with one alpha / rank for all modules, or merge the adapter into its base in PEFT."
        )
    return replace(factors, lora_b=narrowed)


def _cast_to_stored_dtype(values: np.ndarray, dtype: str) -> StoredTensor:
    """Float64 values in a stored dtype, whether they fit or not."""
    with np.errstate(over="ignore", under="ignore"):
        if dtype == "BF16":
            stored = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            stored = values.astype(NUMPY_DTYPES[dtype])
    return StoredTensor(dtype, stored.shape, stored.tobytes())
