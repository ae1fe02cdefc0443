"""The matrix products of LoRA layers with wide arrays: into a few rows, and out of them.

MLX's operations on every device; on CUDA kernels of our own for arrays that fit. Each reads its
wide array once and keeps what is narrow in registers: cuBLAS takes a product, a sum over splits and
a clearing of memory for every layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import accumulate, groupby
from typing import Any

import mlx.core as mx

from nested_core.kernels.device_operations import RANKS_PER_TILE, has_kernel_for_rank
from nested_core.kernels.self_check import CheckedKernel, checked_kernel, random_arrays
from nested_core.rooms.cuda import lora_add
from nested_core.rooms.cuda.kernel_launch import (
    KERNEL_DTYPE,
    MAX_THREADS_PER_BLOCK,
    MULTIPROCESSORS,
    ArraySpec,
    launch_kernel,
    tiles_of_smallest_kernel,
)

Pairs = Sequence[tuple[mx.array, mx.array]]

PAIRS_PER_LAUNCH = 4
BLOCK_ROWS = 16  # rows of a wide array that a block reads at once
WARP_COLUMNS_READ = 32  # columns that a warp reads at once where columns are summed over
BLOCK_COLUMNS = 64  # columns of a block where rows are summed over
BLOCKS_PER_MULTIPROCESSOR = 3  # that a multiprocessor computes at once, where they are small
# As many rows as are summed by one block without being split, which saves the kernel that adds the
# splits: with so few the host is slower than the device.
MOST_UNSPLIT_ROWS = 1024


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
    """Return the same wide arrays and what they are projected to, without their last row.

    So often one above the other that rows are split, and once as they are.
    """
    ((pairs, scale),) = _example_projections(tiles)
    wide = [x[:-1] for _, x in pairs]
    z = project_to_rank_in_mlx(pairs, scale)[:, :-1]
    narrow = z[: RANKS_PER_TILE * tiles], z[RANKS_PER_TILE * tiles :]
    enough = MOST_UNSPLIT_ROWS // len(wide[0]) + 1
    return [
        (
            [
                (mx.concatenate([n] * times, axis=1), mx.concatenate([x] * times))
                for n, x in zip(narrow, wide, strict=True)
            ],
        )
        for times in (enough, 1)
    ]


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
        MOST=_kernel_tiles_for_pairs(pairs),
    )[0]


@checked_kernel(
    "low-rank layers", reference=factor_gradients_in_mlx, examples=_example_factor_gradients
)
def factor_gradients_on_cuda(pairs: Pairs) -> Sequence[mx.array]:
    """Run `factor_gradients` for up to PAIRS_PER_LAUNCH pairs that fit, in one kernel.

    Many rows are split, and another kernel adds the splits.
    """
    rows, dtype = pairs[0][1].shape[0], pairs[0][1].dtype
    nothing: ArraySpec = (0,), dtype
    outputs: list[ArraySpec] = [((z.shape[0], x.shape[1]), dtype) for z, x in pairs]
    outputs += [nothing] * (PAIRS_PER_LAUNCH - len(pairs))
    sizes = [math.prod(shape) for shape, _ in outputs]
    blocks = sum(x.shape[1] for _, x in pairs) // BLOCK_COLUMNS
    tiles = _kernel_tiles_for_pairs(pairs)
    resident = BLOCKS_PER_MULTIPROCESSOR if tiles == 1 else BLOCKS_PER_MULTIPROCESSOR - 1
    most_splits = rows // (BLOCK_ROWS * MAX_THREADS_PER_BLOCK // 32)
    splits = max(1, min(resident * MULTIPROCESSORS // blocks, most_splits))
    if rows <= MOST_UNSPLIT_ROWS:
        splits = 1
    parts: ArraySpec = ((splits, sum(sizes)) if splits > 1 else (0,)), mx.float32
    split_sums, *products = launch_kernel(
        "factor_gradients",
        _pad_to_pairs_per_launch(pairs),
        [parts, *(outputs if splits == 1 else [nothing] * PAIRS_PER_LAUNCH)],
        [rows, *_tiles_and_widths(pairs)],
        blocks=(blocks, splits),
        MOST=tiles,
    )
    if splits > 1:
        products = launch_kernel(
            "sum_of_splits",
            [split_sums],
            outputs,
            [splits, *accumulate(sizes)],
            blocks=(-(-sum(sizes) // (4 * MAX_THREADS_PER_BLOCK)), 1),
            dtypes=[mx.float32],
        )
    return products[: len(pairs)]


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
