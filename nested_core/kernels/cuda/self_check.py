"""A kernel against what it stands in for, on this machine, before it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import mlx.core as mx

from nested_core.backend import to_float

TOLERANCE = 0.02  # of the largest element: a few roundings of a bfloat16


def disagreement(
    ours: Callable[[], Sequence[mx.array]], expected: Sequence[mx.array]
) -> str | None:
    """What is wrong with the arrays that `ours` gives, or None."""
    try:
        found = ours()
        mx.eval(found)
    except RuntimeError as error:
        return f"it failed: {' '.join(str(error).split())[:200]}"
    for mine, theirs in zip(found, expected, strict=True):
        if mine.shape != theirs.shape:
            return f"it gives the shape {mine.shape}, not {theirs.shape}"
        mine, theirs = mine.astype(mx.float32), theirs.astype(mx.float32)
        largest = to_float(mx.abs(theirs).max())
        difference = to_float(mx.abs(mine - theirs).max())
        if not difference <= TOLERANCE * largest:
            return f"it differs by {difference:.3g} where elements are up to {largest:.3g}"
    return None


def is_sound(what: str, trouble: str | None) -> bool:
    """Whether a kernel may be used; a warning says why not."""
    if trouble is not None:
        warnings.warn(
            f"Our CUDA kernel for {what} is not used: {trouble}. MLX's own operations are.",
            stacklevel=2,
        )
    return trouble is None
