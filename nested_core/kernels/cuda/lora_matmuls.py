"""The products of low-rank layers with arrays that are wide: into a few rows, and out of them.

MLX's operations on every device; on CUDA kernels of our own for arrays that they take, where they
agree with MLX on this machine. Each reads its wide array once and keeps what is narrow in
registers: cuBLAS takes a product, a sum over splits and a clearing of memory for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby

import mlx.core as mx

from nested_core import backend
from nested_core.kernels.cuda.launch import DTYPE, MULTIPROCESSORS, THREADS, launch
from nested_core.kernels.cuda.self_check import disagreement, is_sound
from nested_core.kernels.cuda.tiles import TILE, is_in_tiles, made_for

AT_ONCE = 4  # pairs a launch
ROWS, DEPTH, COLUMNS = 16, 32, 64  # of a wide array: rows a block, a warp's reach, columns a block
RESIDENT = 3  # blocks that a multiprocessor computes at once, where they are small

Pairs = Sequence[tuple[mx.array, mx.array]]
Narrow = Callable[[Pairs, float], mx.array]
Outer = Callable[[Pairs], Sequence[mx.array]]


def narrow(pairs: Pairs, scale: float) -> mx.array:
    """Each pair's scale * m @ x.T, one above the other: (all ranks, rows).

    m is (rank, width of its own), x (rows, width).
    """
    chosen = narrow_on_cuda if _is_taken(pairs, DEPTH) else plain_narrow
    parts = [chosen(pairs[i : i + AT_ONCE], scale) for i in range(0, len(pairs), AT_ONCE)]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def outer(pairs: Pairs) -> Sequence[mx.array]:
    """Each pair's z @ x, where z is (rank, rows) and x (rows, width of its own)."""
    is_even = pairs[0][1].shape[0] % 2 == 0  # the kernel reads two neighbours in a row of z
    chosen = outer_on_cuda if is_even and _is_taken(pairs, COLUMNS) else plain_outer
    found: list[mx.array] = []
    for _, alike in groupby(pairs, key=lambda pair: pair[0].shape[0]):  # one kernel suits them all
        group = list(alike)
        for i in range(0, len(group), AT_ONCE):
            found += chosen(group[i : i + AT_ONCE])
    return found


def plain_narrow(pairs: Pairs, scale: float) -> mx.array:
    """`narrow` in MLX's operations."""
    products = [m @ x.T for m, x in pairs]
    return scale * (products[0] if len(products) == 1 else mx.concatenate(products))


def plain_outer(pairs: Pairs) -> Sequence[mx.array]:
    """`outer` in MLX's operations."""
    return [z @ x for z, x in pairs]


def narrow_on_cuda(pairs: Pairs, scale: float) -> mx.array:
    """`narrow` in one kernel, for at most AT_ONCE pairs that fit."""
    rows, dtype = pairs[0][1].shape[0], pairs[0][1].dtype
    arrays, sizes, most = _arguments(pairs)
    ranks = sum(m.shape[0] for m, _ in pairs)
    return launch(
        "narrow",
        arrays,
        [((ranks, rows), dtype)],
        [rows, *sizes, float(scale)],
        blocks=(-(-rows // ROWS), len(pairs)),
        threads=THREADS,
        MOST=most,
    )[0]


def outer_on_cuda(pairs: Pairs) -> Sequence[mx.array]:
    """`outer` in one kernel and a sum, for at most AT_ONCE pairs that fit."""
    rows, dtype = pairs[0][1].shape[0], pairs[0][1].dtype
    arrays, sizes, most = _arguments(pairs)
    shapes = [(z.shape[0], x.shape[1]) for z, x in pairs]
    total = sum(rank * width for rank, width in shapes)
    blocks = sum(width for _, width in shapes) // COLUMNS
    resident = RESIDENT if most == 1 else RESIDENT - 1
    splits = max(1, min(resident * MULTIPROCESSORS // blocks, rows // (ROWS * THREADS // 32)))
    (parts,) = launch(
        "outer",
        arrays,
        [((splits, total), mx.float32)],
        [rows, *sizes],
        blocks=(blocks, splits),
        threads=THREADS,
        MOST=most,
    )
    (whole,) = launch(
        "sum_of_splits",
        [parts],
        [((total,), dtype)],
        [splits, total],
        blocks=(-(-total // (4 * THREADS)), 1),
        threads=THREADS,
    )
    found, start = [], 0
    for rank, width in shapes:
        found.append(whole[start : start + rank * width].reshape(rank, width))
        start += rank * width
    return found


def _arguments(pairs: Pairs) -> tuple[list[mx.array], list[int], int]:
    """AT_ONCE pairs, some of no height, each one's tiles and width, and tiles to be made for."""
    missing = AT_ONCE - len(pairs)
    arrays = [each for pair in [*pairs, *[pairs[0]] * missing] for each in pair]
    tiles = [narrow.shape[0] // TILE for narrow, _ in pairs]
    sizes = [size for n, (_, x) in zip(tiles, pairs, strict=True) for size in (n, x.shape[1])]
    return arrays, sizes + [0, 0] * missing, made_for(TILE * max(tiles))


def _is_taken(pairs: Pairs, multiple: int) -> bool:
    """Whether the kernels take these arrays: bfloat16, whole tiles, ranks and widths that fit."""
    ranks = [each.shape[0] for each, _ in pairs]
    return (
        all(each.dtype == DTYPE for pair in pairs for each in pair)
        and all(map(is_in_tiles, ranks))
        and all(x.shape[1] % multiple == 0 for _, x in pairs)
        and backend.has_cuda()
        and all(map(kernels_agree, {made_for(rank) for rank in ranks}))
    )


@cache
def kernels_agree(most: int) -> bool:
    """Whether the kernels for so many tiles give what MLX does; a warning where they do not."""
    return is_sound("low-rank layers", trouble_with(narrow_on_cuda, outer_on_cuda, most))


def trouble_with(narrow: Narrow, outer: Outer, most: int = 3) -> str | None:
    """What is wrong with two such functions, or None; all loops of the kernels go round twice."""
    rank = TILE * most
    shapes = (311, 1088), (311, 2176), (rank, 1088), (8, 2176)
    keys = mx.random.split(mx.random.key(0), 4)
    x, y, a, b = (
        mx.random.normal(shape, key=key).astype(mx.bfloat16)
        for shape, key in zip(shapes, keys, strict=True)
    )
    pairs = [(a, x), (b, y)]
    z = plain_narrow(pairs, 1.5)
    products = [(z[:rank, :-1], x[:-1]), (z[rank:, :-1], y[:-1])]  # rows are even there
    return disagreement(lambda: [narrow(pairs, 1.5), *outer(products)], [z, *plain_outer(products)])
