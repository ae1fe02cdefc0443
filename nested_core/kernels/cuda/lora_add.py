"""What low-rank layers add to their base layers' outputs: in one pass over them, on CUDA.

MLX makes the low-rank product an array of its own, as wide as the output, and its matmul takes that
along more slowly than it does without. Here a base layer's output is read once, and the product is
made in registers beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import mlx.core as mx

from nested_core import backend
from nested_core.kernels.cuda.launch import DTYPE, MULTIPROCESSORS, THREADS, launch
from nested_core.kernels.cuda.self_check import disagreement, is_sound
from nested_core.kernels.cuda.tiles import TILE, is_in_tiles, made_for

COLUMNS, ROWS = 32, 16  # that a warp takes: widths are multiples
STEPS = 2  # times that many rows, at most
BLOCKS = 8 * MULTIPROCESSORS  # that are left at least where a warp takes more than ROWS
AT_ONCE = 4  # arrays a launch


class LowRankSum(NamedTuple):
    """base + z.T @ factor: of (rows, width), (rank, rows) and (rank, width)."""

    base: mx.array
    z: mx.array
    factor: mx.array

    def plain(self) -> mx.array:
        """The sum in MLX's operations, not rounded before its end."""
        z, factor = self.z.astype(mx.float32), self.factor.astype(mx.float32)
        return self.base.astype(mx.float32) + z.T @ factor


Sums = Sequence[LowRankSum]
Expand = Callable[[Sums], Sequence[mx.array]]


def is_for_kernels(x: mx.array, factors: Sequence[mx.array]) -> bool:
    """Whether x, and (rank, width) factors, are of a dtype and of sizes that the kernels take here.

    Elsewhere MLX's matmul had better take the low-rank product along.
    """
    return (
        all(each.dtype == DTYPE for each in (x, *factors))
        and x.size // x.shape[-1] % 2 == 0
        and all(is_in_tiles(b.shape[0]) and b.shape[1] % COLUMNS == 0 for b in factors)
        and backend.has_cuda()
        and all(map(kernel_agrees, {made_for(b.shape[0]) for b in factors}))
    )


def expand(sums: Sums) -> Sequence[mx.array]:
    """Each sum, in the dtype of its base, for factors that are for the kernels."""
    are_alike = all(each.base.dtype == DTYPE for each in sums)
    return expand_on_cuda(sums) if are_alike else plain_expand(sums)


def plain_expand(sums: Sums) -> Sequence[mx.array]:
    """`expand` in MLX's operations."""
    return [each.plain().astype(each.base.dtype) for each in sums]


def expand_on_cuda(sums: Sums) -> Sequence[mx.array]:
    """`expand` by kernels, AT_ONCE in each; all bases have as many rows."""
    starts = range(0, len(sums), AT_ONCE)
    return [found for i in starts for found in _expand(sums[i : i + AT_ONCE])]


def _expand(sums: Sums) -> Sequence[mx.array]:
    missing = AT_ONCE - len(sums)
    rows, widths = len(sums[0].base), [each.base.shape[1] for each in sums]
    tiles, most = tiles_of(sums)
    sizes = [size for pair in zip(tiles, widths, strict=True) for size in pair]
    steps, blocks = grid_for(rows, max(widths))
    outputs = [(each.base.shape, DTYPE) for each in sums]
    return launch(
        "expand",
        [array for each in [*sums, *[sums[0]] * missing] for array in each],
        [*outputs, *[((0,), DTYPE)] * missing],
        [rows, steps, *sizes, *[0, 0] * missing],
        blocks=(*blocks, len(sums)),
        threads=THREADS,
        MOST=most,
    )[: len(sums)]


def grid_for(rows: int, width: int) -> tuple[int, tuple[int, int]]:
    """How often a warp takes ROWS rows, and the blocks that cover an array."""
    across, down = -(-width // (COLUMNS * THREADS // 32)), -(-rows // ROWS)
    steps = max(1, min(STEPS, across * down // BLOCKS))
    return steps, (across, -(-down // steps))


def tiles_of(sums: Sums) -> tuple[list[int], int]:
    """Each factor's rank in tiles, and the tiles of the kernel that takes them all."""
    ranks = [each.factor.shape[0] for each in sums]
    return [rank // TILE for rank in ranks], made_for(max(ranks))


@cache
def kernel_agrees(most: int) -> bool:
    """Whether the kernel for so many tiles gives what MLX does; a warning where it does not."""
    return is_sound("sums of low-rank layers", trouble_with(expand_on_cuda, most))


def trouble_with(expand: Expand, most: int = 3) -> str | None:
    """What is wrong with such a function, or None; warps take rows more than once."""
    sums = [example(*sizes) for sizes in ((TILE * most, 160), (TILE, 4128))]
    return disagreement(lambda: expand(sums), plain_expand(sums))


def example(rank: int, width: int) -> LowRankSum:
    """Such a sum of random numbers, its parts of one size; always as many rows."""
    keys = mx.random.split(mx.random.key(rank + width), 3)
    shapes = (2010, width), (rank, 2010), (rank, width)
    base, z, factor = (
        mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True)
    )
    return LowRankSum(*(each.astype(DTYPE) for each in (base, z / rank**0.5, factor)))
