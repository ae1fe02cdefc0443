"""The difference between two adapters: tensor by tensor, and in their configurations.

A norm is the root of sums of squares over pieces that fit the processor's cache. They are computed
in float32, and in float64 for a piece whose squares would underflow or overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nested_core.models.adapter_fit import find_differences
from nested_core.records.verdict import Code, Reason, TensorChange
from nested_core.storage.adapter import Adapter
from nested_core.storage.safetensors_files import StoredTensor

# A piece of this length fits the first-level cache, and OpenBLAS starts no threads for it.
VALUES_PER_PIECE = 8192
# Between these bounds float32 computes a piece's sum of squares without underflow or overflow.
SMALLEST_SAFE_SQUARES = 1e-20
LARGEST_SAFE_SQUARES = 1e30
Values = np.typing.NDArray[Any]


@dataclass(frozen=True)
class TensorPairNorms:
    """Frobenius norms of a tensor before and after training and of their difference; may be NaN."""

    before: float
    after: float
    difference: float
    largest_difference: float

    @property
    def is_finite(self) -> bool:
        """Whether every value of both tensors is finite.

        Squares of float32 cannot overflow in float64; float64 values beyond 1e154 count as not
        finite.
        """
        return math.isfinite(self.before) and math.isfinite(self.after)


def compare_tensors(
    initial: Adapter, trained: Adapter, tiers: Mapping[str, int]
) -> list[TensorChange]:
    """Compare each tensor that both adapters hold, in name order, by bytes and by value."""
    both = sorted(initial.tensors.keys() & trained.tensors.keys())
    # In one thread: the pieces are so short that more threads would wait for the interpreter lock.
    return [_compare_tensor(n, tiers.get(n), initial.tensors[n], trained.tensors[n]) for n in both]


def _compare_tensor(
    name: str, tier: int | None, before: StoredTensor, after: StoredTensor
) -> TensorChange:
    """Return how one tensor changed.

    The differences are None if the shapes differ or a value is not finite. The relative difference
    is that of Frobenius norms, over the larger of the two norms.
    """
    if before.shape != after.shape:
        is_finite = all(bool(np.isfinite(t.to_numpy()).all()) for t in (before, after))
        return TensorChange(name, tier, True, None, None, is_finite)
    has_changed = tensors_differ(before, after)
    norms = _compute_norms(before, after)
    if not norms.is_finite:
        return TensorChange(name, tier, has_changed, None, None, False)
    scale = max(norms.before, norms.after)
    relative = norms.difference / scale if scale else 0.0
    return TensorChange(name, tier, has_changed, norms.largest_difference, relative, True)


def tensors_differ(before: StoredTensor, after: StoredTensor) -> bool:
    """Whether two tensors differ in dtype, shape or any byte."""
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return True
    old, new = (np.frombuffer(tensor.data, np.uint8) for tensor in (before, after))
    return any(not np.array_equal(a, b) for a, b in _split_values(old, new, 8 * VALUES_PER_PIECE))


def frobenius_norm(tensor: StoredTensor) -> float:
    """Return the root of a tensor's sum of squares; NaN or infinity if a value is not finite."""
    values = tensor.to_numpy().reshape(-1)
    with np.errstate(all="ignore"):
        return math.sqrt(
            sum(_squared_norm(a) for a, _ in _split_values(values, values, VALUES_PER_PIECE))
        )


def _compute_norms(before: StoredTensor, after: StoredTensor) -> TensorPairNorms:
    """Compute the norms of two tensors of the same shape and of their difference, by pieces.

    By pieces, so that no wider copy of a whole tensor is made. Values that are not finite give
    norms that are not.
    """
    old, new = (tensor.to_numpy().reshape(-1) for tensor in (before, after))
    dtype = np.float64 if np.float64 in (old.dtype, new.dtype) else np.float32
    old_squared = new_squared = difference_squared = largest_difference = 0.0
    with np.errstate(all="ignore"):
        for old_piece, new_piece in _split_values(old, new, VALUES_PER_PIECE):
            a = old_piece.astype(dtype, copy=False)
            b = new_piece.astype(dtype, copy=False)
            squared, largest = _difference_squares_and_max(a, b)
            old_squared += _squared_norm(a)
            new_squared += _squared_norm(b)
            difference_squared += squared
            largest_difference = max(largest_difference, largest)
    old_norm, new_norm = math.sqrt(old_squared), math.sqrt(new_squared)
    return TensorPairNorms(old_norm, new_norm, math.sqrt(difference_squared), largest_difference)


def _split_values(old: Values, new: Values, length: int) -> Iterator[tuple[Values, Values]]:
    """Yield pairs of pieces of at most `length` values from two flat arrays of the same length."""
    for start in range(0, len(old), length):
        yield old[start : start + length], new[start : start + length]


def _difference_squares_and_max(old: Values, new: Values) -> tuple[float, float]:
    """Return the sum of squares of new - old, and its largest absolute value."""
    delta = new - old
    squared = float(np.dot(delta, delta))
    if not SMALLEST_SAFE_SQUARES < squared < LARGEST_SAFE_SQUARES:
        delta = new.astype(np.float64) - old.astype(np.float64)
        squared = float(np.dot(delta, delta))
    return squared, max(float(delta.max()), -float(delta.min()))


def _squared_norm(values: Values) -> float:
    """Return the sum of squares, in float64 if float32 would underflow or overflow."""
    squared = float(np.dot(values, values))
    if not SMALLEST_SAFE_SQUARES < squared < LARGEST_SAFE_SQUARES:
        wide = values.astype(np.float64)
        squared = float(np.dot(wide, wide))
    return squared


def mismatch_reasons(initial: Adapter, trained: Adapter) -> list[Reason]:
    """Return reasons for tensors that cannot be compared because name, shape or dtype differ."""
    before, after = initial.tensors, trained.tensors
    both = before.keys() & after.keys()
    missing = before.keys() - after.keys()
    unexpected = after.keys() - before.keys()
    shapes = [name for name in both if before[name].shape != after[name].shape]
    dtypes = [name for name in both if before[name].dtype != after[name].dtype]
    return [
        *reasons_about_tensors("tensor_missing", missing, "not in the trained adapter"),
        *reasons_about_tensors("tensor_unexpected", unexpected, "not in the initial adapter"),
        *reasons_about_tensors(
            "shape_mismatch", shapes, "of another shape than in the initial adapter"
        ),
        *reasons_about_tensors(
            "dtype_mismatch", dtypes, "of another dtype than in the initial adapter"
        ),
    ]


def non_finite_tensor_reasons(initial: Adapter, changes: Sequence[TensorChange]) -> list[Reason]:
    """Return reasons for tensors with values that are not finite.

    Tensors that are not finite in `initial` already get a reason of their own, because training is
    not to blame for them.
    """
    broken = {change.name for change in changes if not change.finite}
    from_the_start = {n for n in broken if not math.isfinite(frobenius_norm(initial.tensors[n]))}
    return [
        *reasons_about_tensors(
            "non_finite", from_the_start, "with NaN or infinity in the initial adapter already"
        ),
        *reasons_about_tensors("non_finite", broken - from_the_start, "with NaN or infinity"),
    ]


def unchanged_reasons(changes: Sequence[TensorChange]) -> list[Reason]:
    """Return the reason "unchanged" if all tensors equal the initial ones, byte for byte."""
    if any(change.changed for change in changes):
        return []
    message = f"all {len(changes)} tensors equal the initial adapter, byte for byte"
    return [Reason("unchanged", message, tuple(change.name for change in changes))]


def small_change_reasons(
    changes: Sequence[TensorChange], min_relative_change: float
) -> list[Reason]:
    """Return the reason "unchanged" if no tensor's relative change reaches the bound."""
    names = tuple(change.name for change in changes)
    largest = max(change.relative_delta or 0.0 for change in changes)
    if largest < min_relative_change:
        message = (
            f"no tensor moved by more than {largest:.3g} of its norm; "
            f"gate.min_relative_change is {min_relative_change:g}"
        )
        return [Reason("unchanged", message, names)]
    return []


def reasons_about_tensors(code: Code, names: Iterable[str], problem: str) -> list[Reason]:
    """Return one reason that lists the tensors in name order; empty without tensors.

    `problem` follows the count, as in "2 tensors with NaN or infinity, q_proj.lora_a first".
    """
    ordered = tuple(sorted(names))
    if not ordered:
        return []
    count = "1 tensor" if len(ordered) == 1 else f"{len(ordered)} tensors"
    first = "" if len(ordered) == 1 else " first"
    return [Reason(code, f"{count} {problem}, {ordered[0]}{first}", ordered)]


def configuration_reasons(initial: Adapter, trained: Adapter) -> list[Reason]:
    """Return the reason if the two adapter_config.json describe different adapters."""
    if not (differing := find_differences(initial, trained)):
        return []
    return [
        Reason("config_mismatch", f"adapter_config.json differs in {'; '.join(differing.values())}")
    ]


def named_base_reasons(initial: Adapter, trained: Adapter) -> list[Reason]:
    """Return the reason if the two adapter_config.json name different base models.

    Compared by fingerprint, or by the `model` path if one of the configurations, written by another
    program, has no fingerprint.
    """
    before, after = (adapter.meaning()["base_fingerprint"] for adapter in (initial, trained))
    if before is None or after is None:
        before, after = initial.config.get("model"), trained.config.get("model")
    if before == after:
        return []
    return [Reason("base_mismatch", f"made for base {before}, now for {after}")]
