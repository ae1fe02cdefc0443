"""The ranks that there are kernels for: those of whole tiles, up to the largest."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nested_core import backend

TILE = 8  # rows of a factor in one fragment
TILES = 1, 2, 3, 4, 6, 8  # that a kernel is made for


def is_in_tiles(rank: int) -> bool:
    """Whether a factor of this rank is of whole tiles, and no more than a kernel is made for."""
    return 0 < rank <= TILE * TILES[-1] and rank % TILE == 0


def made_for(rank: int) -> int:
    """The tiles of the kernel that takes factors up to this rank."""
    return min(each for each in TILES if TILE * each >= rank)


def check_kernels(ranks: Iterable[int], agree: Callable[[int], bool]) -> None:
    """Compile and check the kernels for these ranks now, and not while a step is traced.

    `agree` says of the kernels for so many tiles whether they give what MLX does.
    """
    for most in sorted({made_for(rank) for rank in ranks if is_in_tiles(rank)}):
        if backend.has_cuda():
            agree(most)
