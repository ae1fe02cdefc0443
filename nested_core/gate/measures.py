"""How far one tensor is from another, at nearly the speed of reading them.

Sums run in float32 over pieces that stay in the cache, and in float64 wherever a piece's numbers
are too small or too large for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nested_core.storage.adapter import Tensor

PIECE = 8192  # in the first cache, and below the size for which OpenBLAS starts threads
SMALLEST, LARGEST = 1e-20, 1e30  # squares of a piece that float32 sums without loss
Values = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Measured:
    """Two tensors of one shape: whether their bytes differ, and norms that may be NaN."""

    has_changed: bool
    old_norm: float
    new_norm: float
    delta_norm: float
    largest: float

    @property
    def is_finite(self) -> bool:
        """Whether every value of both is finite: squares of float32 cannot overflow in float64."""
        return math.isfinite(self.old_norm) and math.isfinite(self.new_norm)


def differ(before: Tensor, after: Tensor) -> bool:
    """Whether dtype, shape or any byte differs."""
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return True
    old, new = (np.frombuffer(tensor.data, np.uint8) for tensor in (before, after))
    return any(not np.array_equal(a, b) for a, b in _pieces(old, new, 8 * PIECE))


def measure(before: Tensor, after: Tensor) -> Measured:
    """Compare two tensors of one shape by bytes and by value."""
    old, new = (tensor.to_numpy().reshape(-1) for tensor in (before, after))
    wide = old.dtype == np.float64 or new.dtype == np.float64
    kind = np.float64 if wide else np.float32
    sums, largest = [0.0, 0.0, 0.0], 0.0
    with np.errstate(all="ignore"):
        for a, b in _pieces(old, new, PIECE):
            own, top = _sums(a.astype(kind, copy=False), b.astype(kind, copy=False))
            sums = [total + each for total, each in zip(sums, own, strict=True)]
            largest = max(largest, top)
    old_norm, new_norm, delta_norm = map(math.sqrt, sums)
    return Measured(differ(before, after), old_norm, new_norm, delta_norm, largest)


def norm(tensor: Tensor) -> float:
    """The Frobenius norm."""
    values = tensor.to_numpy().reshape(-1)
    with np.errstate(all="ignore"):
        return math.sqrt(sum(_square(a) for a, _ in _pieces(values, values, PIECE)))


def _pieces(old: Values, new: Values, length: int) -> Iterator[tuple[Values, Values]]:
    for start in range(0, len(old), length):
        yield old[start : start + length], new[start : start + length]


def _sums(old: Values, new: Values) -> tuple[tuple[float, float, float], float]:
    """Squares of old, new and their difference, and the largest absolute difference."""
    delta = new - old
    squared = float(np.dot(delta, delta))
    if not SMALLEST < squared < LARGEST:
        delta = new.astype(np.float64) - old.astype(np.float64)
        squared = float(np.dot(delta, delta))
    return (_square(old), _square(new), squared), max(float(delta.max()), -float(delta.min()))


def _square(values: Values) -> float:
    squared = float(np.dot(values, values))
    if not SMALLEST < squared < LARGEST:
        wide = values.astype(np.float64)
        squared = float(np.dot(wide, wide))
    return squared
