"""Base layers' outputs plus their LoRA products, in one pass over the outputs on CUDA.

MLX makes the low-rank product an array of its own, as wide as the output, or has its matmul add to
it, which is slower than without. Here a base layer's output is read once, and the product is made
in registers beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from nested_core.kernels.device_operations import RANKS_PER_TILE, has_kernel_for_rank
from nested_core.kernels.self_check import checked_kernel, random_arrays
from nested_core.rooms.cuda.kernel_launch import (
    KERNEL_DTYPE,
    MAX_THREADS_PER_BLOCK,
    MULTIPROCESSORS,
    launch_kernel,
    tiles_of_smallest_kernel,
)

WARP_COLUMNS, WARP_ROWS = 32, 16  # that a warp computes at once: widths are multiples
MAX_STEPS_PER_WARP = 2  # times that a warp computes so many rows
MIN_BLOCKS = 8 * MULTIPROCESSORS  # that are left where a warp computes more than WARP_ROWS
SUMS_PER_LAUNCH = 4


class LowRankSumTerms(NamedTuple):
    """base + z.T @ factor: of (rows, width), (rank, rows) and (rank, width)."""

    base: mx.array
    z: mx.array
    factor: mx.array

    def computed_in_float32(self) -> mx.array:
        """Return the sum in MLX's operations, not rounded to the arrays' dtype."""
        z, factor = self.z.astype(mx.float32), self.factor.astype(mx.float32)
        return self.base.astype(mx.float32) + z.T @ factor


Sums = Sequence[LowRankSumTerms]


def can_use_lora_kernels(x: mx.array, factors: Sequence[mx.array]) -> bool:
    """Tell whether the kernels take x, and (rank, width) factors, by dtype and size.

    For others it is faster to have MLX's matmul add the low-rank product.
    """
    return (
        all(array.dtype == KERNEL_DTYPE for array in (x, *factors))
        and x.size // x.shape[-1] % 2 == 0
        and all(has_kernel_for_rank(b.shape[0]) and b.shape[1] % WARP_COLUMNS == 0 for b in factors)
        and all(
            low_rank_sums_on_cuda.is_usable(tiles_of_smallest_kernel(b.shape[0])) for b in factors
        )
    )


def compute_low_rank_sums(sums: Sums) -> Sequence[mx.array]:
    """Return each sum, in the dtype of its base, for factors that fit the kernels."""
    if all(each.base.dtype == KERNEL_DTYPE for each in sums):
        return low_rank_sums_on_cuda(sums)
    return low_rank_sums_in_mlx(sums)


def low_rank_sums_in_mlx(sums: Sums) -> Sequence[mx.array]:
    """Compute `compute_low_rank_sums` by MLX's operations."""
    return [each.computed_in_float32().astype(each.base.dtype) for each in sums]


def random_low_rank_sum_terms(rank: int, width: int) -> LowRankSumTerms:
    """Return a sum of random numbers whose two terms are of one size; it has 2,010 rows."""
    base, z, factor = random_arrays(
        (2010, width), (rank, 2010), (rank, width), dtype=mx.float32, seed=rank + width
    )
    return LowRankSumTerms(
        base.astype(KERNEL_DTYPE), (z / rank**0.5).astype(KERNEL_DTYPE), factor.astype(KERNEL_DTYPE)
    )


def _example_inputs(tiles: int) -> list[tuple[Sums]]:
    """Make sums of two widths, with rows left over and warps that compute rows more than once."""
    return [
        (
            [
                random_low_rank_sum_terms(RANKS_PER_TILE * tiles, 160),
                random_low_rank_sum_terms(RANKS_PER_TILE, 4128),
            ],
        )
    ]


@checked_kernel("sums of low-rank layers", reference=low_rank_sums_in_mlx, examples=_example_inputs)
def low_rank_sums_on_cuda(sums: Sums) -> Sequence[mx.array]:
    """Compute the sums by kernels of SUMS_PER_LAUNCH each; all bases have as many rows."""
    outputs: list[mx.array] = []
    for start in range(0, len(sums), SUMS_PER_LAUNCH):
        outputs += _launch_low_rank_sums(sums[start : start + SUMS_PER_LAUNCH])
    return outputs


def _launch_low_rank_sums(sums: Sums) -> Sequence[mx.array]:
    """Compute up to SUMS_PER_LAUNCH low-rank sums in one launch, and return them."""
    missing = SUMS_PER_LAUNCH - len(sums)  # these are of no size
    rows = len(sums[0].base)
    widths = [each.base.shape[1] for each in sums]
    tiles = [count_rank_tiles(each) for each in sums]
    sizes = [size for pair in zip(tiles, widths, strict=True) for size in pair]
    steps, blocks = warp_steps_and_grid(rows, max(widths))
    return launch_kernel(
        "low_rank_sums",
        [array for each in [*sums, *[sums[0]] * missing] for array in each],
        [*((each.base.shape, KERNEL_DTYPE) for each in sums), *[((0,), KERNEL_DTYPE)] * missing],
        [rows, steps, *sizes, *[0, 0] * missing],
        blocks=(*blocks, len(sums)),
        MOST=kernel_tiles_for_sums(sums),
    )[: len(sums)]


def warp_steps_and_grid(rows: int, width: int) -> tuple[int, tuple[int, int]]:
    """Return how often a warp computes WARP_ROWS rows, and the blocks that cover an array."""
    across, down = -(-width // (WARP_COLUMNS * MAX_THREADS_PER_BLOCK // 32)), -(-rows // WARP_ROWS)
    steps = max(1, min(MAX_STEPS_PER_WARP, across * down // MIN_BLOCKS))
    return steps, (across, -(-down // steps))


def count_rank_tiles(each: LowRankSumTerms) -> int:
    """Return the rank of a sum's factor, in tiles."""
    return each.factor.shape[0] // RANKS_PER_TILE


def kernel_tiles_for_sums(sums: Sums) -> int:
    """Return the tiles of the kernel that takes all of these factors."""
    return tiles_of_smallest_kernel(max(each.factor.shape[0] for each in sums))
