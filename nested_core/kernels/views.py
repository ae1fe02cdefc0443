"""Views that take few operations, for steps whose time is the host's.

On CUDA, MLX takes nearly as long to make a view as to start a kernel, and a traced step makes each
of its views again (benchmarks/README.md, "A small model's step").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate

import mlx.core as mx

MOST_PARTS_OF_A_SPLIT = 10  # into more, mx.split makes a slice for each

# By a view's id: the view, which so keeps its id, what it is a view of, and the axes swapped in it.
KnownViews = dict[int, tuple[mx.array, mx.array, tuple[int, int]]]

_known_views: ContextVar[KnownViews | None] = ContextVar("known_views", default=None)


@contextmanager
def knowing_views() -> Iterator[None]:
    """Have `swap_axes` know its views during the block, in which a function is traced."""
    token = _known_views.set({})
    try:
        yield
    finally:
        _known_views.reset(token)


def swap_axes(array: mx.array, first: int, second: int) -> mx.array:
    """Return `array.swapaxes(first, second)`; for a known view, the array that it is a view of.

    An adapter's factors are stored in one orientation, have another in mlx-lm's layers, and are
    multiplied in the first. A gradient with respect to what is returned is not swapped either.
    Arrays that a model may change in place must not come here: they keep their ids.
    """
    known = _known_views.get()
    if known is None:
        return array.swapaxes(first, second)
    if id(array) in known and known[id(array)][2] == (first, second):
        return known[id(array)][1]
    view = array.swapaxes(first, second)
    known[id(view)] = view, array, (first, second)
    return view


def split_rows(array: mx.array, counts: Sequence[int]) -> list[mx.array]:
    """Return an array (rows, ...) in parts of so many rows each."""
    ends = [0, *accumulate(counts)]
    parts: list[mx.array] = []
    for first in range(0, len(counts), MOST_PARTS_OF_A_SPLIT):
        some = ends[first : first + MOST_PARTS_OF_A_SPLIT + 1]
        rows = array if len(some) == len(ends) else array[some[0] : some[-1]]
        parts += mx.split(rows, [end - some[0] for end in some[1:-1]])
    return parts
