"""The ranks that CUDA kernels are compiled for: multiples of a tile, up to the largest."""

from __future__ import annotations

RANKS_PER_TILE = 8  # rows of a factor in one fragment of a matrix instruction
COMPILED_TILE_COUNTS = 1, 2, 3, 4, 6, 8  # numbers of tiles that a kernel is compiled for


def has_kernel_for_rank(rank: int) -> bool:
    """Whether a factor of this rank fills whole tiles, no more than a kernel is compiled for."""
    return 0 < rank <= RANKS_PER_TILE * COMPILED_TILE_COUNTS[-1] and rank % RANKS_PER_TILE == 0


def tiles_of_smallest_kernel(rank: int) -> int:
    """The tiles of the smallest kernel that takes factors up to this rank."""
    return min(tiles for tiles in COMPILED_TILE_COUNTS if RANKS_PER_TILE * tiles >= rank)
