"""The products of low-rank layers with arrays that are wide: into a few rows, and out of them.

MLX's operations on every device; on CUDA kernels of our own for arrays that they take, where they
agree with MLX on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx

from nested_core import backend
from nested_core.kernels import low_rank_cuda
from nested_core.kernels.checking import disagreement, is_sound
from nested_core.kernels.low_rank_cuda import COLUMNS, DEPTH, TILE, Pairs

MOST_RANKS = 64  # that a kernel keeps in registers
HALF_TYPES = (mx.bfloat16, mx.float16)

Narrow = Callable[[Pairs, Sequence[float]], mx.array]
Outer = Callable[[Pairs], Sequence[mx.array]]


def narrow(pairs: Pairs, scales: Sequence[float]) -> mx.array:
    """Each pair's m @ x.T, one above the other, times scales: (all ranks, rows).

    m is (rank, width of its own), x (rows, width); one scale for each rank.
    """
    if _fits(pairs, DEPTH) and kernels_agree():
        return low_rank_cuda.narrow(pairs, scales)
    return plain_narrow(pairs, scales)


def outer(pairs: Pairs) -> Sequence[mx.array]:
    """Each pair's z @ x, where z is (rank, rows) and x (rows, width of its own)."""
    if _fits(pairs, COLUMNS) and kernels_agree():
        return low_rank_cuda.outer(pairs)
    return plain_outer(pairs)


def plain_narrow(pairs: Pairs, scales: Sequence[float]) -> mx.array:
    """`narrow` in MLX's operations."""
    products = [m @ x.T for m, x in pairs]
    whole = products[0] if len(products) == 1 else mx.concatenate(products)
    if len(set(scales)) == 1:
        return whole * scales[0]
    return whole * mx.array(list(scales), whole.dtype)[:, None]


def plain_outer(pairs: Pairs) -> Sequence[mx.array]:
    """`outer` in MLX's operations."""
    return [z @ x for z, x in pairs]


def _fits(pairs: Pairs, multiple: int) -> bool:
    """Whether the kernels take these arrays: half precision, whole tiles, and ranks that fit."""
    ranks = [each.shape[0] for each, _ in pairs]
    return (
        all(each.dtype == pairs[0][0].dtype for pair in pairs for each in pair)
        and pairs[0][0].dtype in HALF_TYPES
        and all(rank % TILE == 0 for rank in ranks)
        and max(ranks) <= MOST_RANKS
        and all(x.shape[1] % multiple == 0 for _, x in pairs)
    )


@cache
def kernels_agree() -> bool:
    """Whether the kernels give what MLX does on this machine; a warning where they do not."""
    return backend.has_cuda() and is_sound(
        "low-rank layers", trouble_with(low_rank_cuda.narrow, low_rank_cuda.outer)
    )


def trouble_with(narrow: Narrow, outer: Outer) -> str | None:
    """What is wrong with two such functions, or None; rows and ranks are of several tiles."""
    keys = mx.random.split(mx.random.key(0), 4)
    x, y = (
        mx.random.normal((53, n), key=k).astype(mx.bfloat16)
        for n, k in zip((128, 192), keys, strict=False)
    )
    a, b = (
        mx.random.normal((r, n), key=k).astype(mx.bfloat16)
        for r, n, k in zip((24, 8), (128, 192), keys[2:], strict=True)
    )
    scales = [1.0 + i / 8 for i in range(32)]
    pairs = [(a, x), (b, y)]
    z = plain_narrow(pairs, scales)
    products = [(z[:24], x), (z[24:], y)]
    return disagreement(
        lambda: [narrow(pairs, scales), *outer(products)], [z, *plain_outer(products)]
    )
