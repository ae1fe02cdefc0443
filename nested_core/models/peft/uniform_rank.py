"""Give all modules one rank and one scale, as mlx-lm needs, without changing any product.

Lower ranks are padded with zeros; another scale is multiplied into lora_b if that is exact, and
refused otherwise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from nested_core.errors import ConfigError
from nested_core.models.peft.lora_factors import ModuleFactors
from nested_core.storage.safetensors_files import NUMPY_DTYPES, StoredTensor


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
