"""The matrix products of LoRA layers with wide arrays: into a few rows, and out of them.

MLX's operations on every device; on CUDA kernels of our own for arrays that fit. Each reads its
wide array once and keeps what is narrow in registers: cuBLAS takes a product, a sum over splits and
a clearing of memory for every layer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

import mlx.core as mx

from nested_core.kernels.device_operations import RANKS_PER_TILE, has_kernel_for_rank
from nested_core.kernels.self_check import CheckedKernel, checked_kernel, random_arrays
from nested_core.rooms.cuda import lora_add
from nested_core.rooms.cuda.kernel_launch import (
    KERNEL_DTYPE,
    MAX_THREADS_PER_BLOCK,
    MULTIPROCESSORS,
    launch_kernel,
    tiles_of_smallest_kernel,
)

Pairs = Sequence[tuple[mx.array, mx.array]]

PAIRS_PER_LAUNCH = 4
BLOCK_ROWS = 16  # rows of a wide array that a block reads at once
WARP_COLUMNS_READ = 32  # columns that a warp reads at once where columns are summed over
BLOCK_COLUMNS = 64  # columns of a block where rows are summed over
BLOCKS_PER_MULTIPROCESSOR = 3  # that a multiprocessor computes at once, where they are small


def project_to_rank_in_mlx(pairs: Pairs, scale: float) -> mx.array:
    """Return scale * m @ x.T of each pair (m, x), stacked to (sum of ranks, rows).

    m: (rank, width); x: (rows, width). Widths may differ between pairs.
    """
    products = [m @ x.T for m, x in pairs]
    return scale * (products[0] if len(products) == 1 else mx.concatenate(products))


def factor_gradients_in_mlx(pairs: Pairs) -> Sequence[mx.array]:
    """Return z @ x of each pair (z, x), where z is (rank, rows) and x (rows, width)."""
    return [z @ x for z, x in pairs]


def project_to_rank(pairs: Pairs, scale: float) -> mx.array:
    """Return each pair's scale * m @ x.T, one above the other: (all ranks, rows).

    m is (rank, width of its own), x (rows, width).
    """
    fits = _can_use_kernel(project_to_rank_on_cuda, pairs, WARP_COLUMNS_READ)
    project = project_to_rank_on_cuda if fits else project_to_rank_in_mlx
    starts = range(0, len(pairs), PAIRS_PER_LAUNCH)
    parts = [project(pairs[i : i + PAIRS_PER_LAUNCH], scale) for i in starts]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def factor_gradients(pairs: Pairs) -> Sequence[mx.array]:
    """Return each pair's z @ x, where z is (rank, rows) and x (rows, width of its own)."""
    has_even_rows = pairs[0][1].shape[0] % 2 == 0  # the kernel reads two neighbours in a row of z
    fits = has_even_rows and _can_use_kernel(factor_gradients_on_cuda, pairs, BLOCK_COLUMNS)
    multiply = factor_gradients_on_cuda if fits else factor_gradients_in_mlx
    products: list[mx.array] = []
    for _, same_rank in groupby(pairs, key=lambda pair: pair[0].shape[0]):  # one kernel suits all
        group = list(same_rank)
        for i in range(0, len(group), PAIRS_PER_LAUNCH):
            products += multiply(group[i : i + PAIRS_PER_LAUNCH])
    return products


def _can_use_kernel(kernel: CheckedKernel[Any, Any], pairs: Pairs, multiple: int) -> bool:
    """Tell if a kernel takes these arrays: bfloat16, ranks of whole tiles, widths that fit."""
    ranks = [narrow.shape[0] for narrow, _ in pairs]
    return (
        all(array.dtype == KERNEL_DTYPE for pair in pairs for array in pair)
        and all(map(has_kernel_for_rank, ranks))
        and all(x.shape[1] % multiple == 0 for _, x in pairs)
        and all(map(kernel.is_usable, {tiles_of_smallest_kernel(rank) for rank in ranks}))
    )


def _example_projections(tiles: int) -> list[tuple[Pairs, float]]:
    """Make arrays for which all loops of the kernels go round twice, with an odd number of rows."""
    x, y, a, b = random_arrays((311, 1088), (311, 2176), (RANKS_PER_TILE * tiles, 1088), (8, 2176))
    return [([(a, x), (b, y)], 1.5)]


def _example_factor_gradients(tiles: int) -> list[tuple[Pairs]]:
    """Return the same wide arrays and what they are projected to, without their last row."""
    ((pairs, scale),) = _example_projections(tiles)
    (_, x), (_, y) = pairs
    z = project_to_rank_in_mlx(pairs, scale)[:, :-1]
    return [([(z[: RANKS_PER_TILE * tiles], x[:-1]), (z[RANKS_PER_TILE * tiles :], y[:-1])],)]


@checked_kernel("low-rank layers", reference=project_to_rank_in_mlx, examples=_example_projections)
def project_to_rank_on_cuda(pairs: Pairs, scale: float) -> mx.array:
    """Run `project_to_rank` in one kernel, for at most PAIRS_PER_LAUNCH pairs that fit."""
    rows, dtype = pairs[0][1].shape[0], pairs[0][1].dtype
    return launch_kernel(
        "project_to_rank",
        _pad_to_pairs_per_launch(pairs),
        [((sum(m.shape[0] for m, _ in pairs), rows), dtype)],
        [rows, *_tiles_and_widths(pairs), float(scale)],
        blocks=(-(-rows // BLOCK_ROWS), len(pairs)),
        threads=MAX_THREADS_PER_BLOCK,
        MOST=_kernel_tiles_for_pairs(pairs),
    )[0]


@checked_kernel(
    "low-rank layers", reference=factor_gradients_in_mlx, examples=_example_factor_gradients
)
def factor_gradients_on_cuda(pairs: Pairs) -> Sequence[mx.array]:
    """Run `factor_gradients` in one kernel and a sum, for up to PAIRS_PER_LAUNCH pairs that fit."""
    rows, dtype = pairs[0][1].shape[0], pairs[0][1].dtype
    shapes = [(z.shape[0], x.shape[1]) for z, x in pairs]
    total = sum(rank * width for rank, width in shapes)
    blocks = sum(width for _, width in shapes) // BLOCK_COLUMNS
    tiles = _kernel_tiles_for_pairs(pairs)
    resident = BLOCKS_PER_MULTIPROCESSOR if tiles == 1 else BLOCKS_PER_MULTIPROCESSOR - 1
    most_splits = rows // (BLOCK_ROWS * MAX_THREADS_PER_BLOCK // 32)
    splits = max(1, min(resident * MULTIPROCESSORS // blocks, most_splits))
    (parts,) = launch_kernel(
        "factor_gradients",
        _pad_to_pairs_per_launch(pairs),
        [((splits, total), mx.float32)],
        [rows, *_tiles_and_widths(pairs)],
        blocks=(blocks, splits),
        threads=MAX_THREADS_PER_BLOCK,
        MOST=tiles,
    )
    (summed,) = launch_kernel(
        "sum_of_splits",
        [parts],
        [((total,), dtype)],
        [splits, total],
        blocks=(-(-total // (4 * MAX_THREADS_PER_BLOCK)), 1),
        threads=MAX_THREADS_PER_BLOCK,
        dtypes=[mx.float32],
    )
    products, start = [], 0
    for rank, width in shapes:
        products.append(summed[start : start + rank * width].reshape(rank, width))
        start += rank * width
    return products


def _pad_to_pairs_per_launch(pairs: Pairs) -> list[mx.array]:
    """Return the arrays of PAIRS_PER_LAUNCH pairs; what is missing repeats the first one."""
    missing = PAIRS_PER_LAUNCH - len(pairs)
    return [array for pair in [*pairs, *[pairs[0]] * missing] for array in pair]


def _tiles_and_widths(pairs: Pairs) -> list[int]:
    """Return each pair's tiles and width, 0 for pairs that are missing."""
    sizes = [size for m, x in pairs for size in (m.shape[0] // RANKS_PER_TILE, x.shape[1])]
    return sizes + [0, 0] * (PAIRS_PER_LAUNCH - len(pairs))


def _kernel_tiles_for_pairs(pairs: Pairs) -> int:
    return tiles_of_smallest_kernel(max(narrow.shape[0] for narrow, _ in pairs))


def check_lora_kernels(ranks: Collection[int]) -> None:
    """Compile and check the kernels for layers of these ranks now, not while a step is traced."""
    for tiles in sorted(
        {tiles_of_smallest_kernel(rank) for rank in ranks if has_kernel_for_rank(rank)}
    ):
        project_to_rank_on_cuda.is_usable(tiles)
        factor_gradients_on_cuda.is_usable(tiles)
        lora_add.low_rank_sums_on_cuda.is_usable(tiles)
