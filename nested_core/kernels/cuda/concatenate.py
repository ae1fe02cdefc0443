"""Many small arrays one after the other in one vector, by one kernel on CUDA.

An adapter's gradients are hundreds of arrays, and MLX copies each with a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

import mlx.core as mx

from nested_core import backend
from nested_core.kernels.cuda.launch import THREADS, launch
from nested_core.kernels.cuda.self_check import disagreement, is_sound

WIDTH = 16  # bytes of a load
MOST = 32  # arrays a launch: their addresses are arguments
BLOCKS = 4  # for each array

Join = Callable[[Sequence[mx.array]], mx.array]


def joined(arrays: Sequence[mx.array]) -> mx.array:
    """The elements of all arrays in their order; they are of one dtype."""
    is_even = all(a.nbytes % WIDTH == 0 and a.dtype == arrays[0].dtype for a in arrays)
    if len(arrays) > 1 and is_even and backend.has_cuda() and join_agrees():
        return _in_groups(arrays, join_on_cuda)
    return plain_join(arrays)


def plain_join(arrays: Sequence[mx.array]) -> mx.array:
    """`joined` by MLX."""
    vectors = [array.reshape(-1) for array in arrays]
    return vectors[0] if len(vectors) == 1 else mx.concatenate(vectors)


def _in_groups(arrays: Sequence[mx.array], join: Join) -> mx.array:
    """As many at once as a kernel takes, and then what came of them."""
    while len(arrays) > 1:
        arrays = [join(arrays[i : i + MOST]) for i in range(0, len(arrays), MOST)]
    return arrays[0].reshape(-1)


def join_on_cuda(arrays: Sequence[mx.array]) -> mx.array:
    """`joined` in one kernel, for at most MOST arrays of a multiple of WIDTH bytes."""
    ends = list(accumulate(array.nbytes // WIDTH for array in arrays))
    missing = MOST - len(arrays)
    return launch(
        "join",
        [*arrays, *[arrays[-1]] * missing],
        [((sum(array.size for array in arrays),), arrays[0].dtype)],
        [*ends, *[ends[-1]] * missing],
        blocks=(BLOCKS, len(arrays)),
        threads=THREADS,
    )[0]


@cache
def join_agrees() -> bool:
    """Whether the kernel gives what MLX does on this machine; a warning where it does not."""
    return is_sound("joining arrays", trouble_with(join_on_cuda))


def trouble_with(join: Join) -> str | None:
    """What is wrong with such a function, or None; all arrays' elements are of one size."""
    sizes = 8, 16384, 24  # loads of the second go round twice
    keys = mx.random.split(mx.random.key(0), len(sizes))
    arrays = [
        mx.random.normal((size,), key=key).astype(mx.bfloat16)
        for size, key in zip(sizes, keys, strict=True)
    ]
    return disagreement(lambda: [join(arrays)], [plain_join(arrays)])
