"""Many small arrays one after the other in one vector, by one kernel on CUDA.

An adapter's gradients are hundreds of arrays, and MLX copies each with a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import mlx.core as mx

from nested_core import backend
from nested_core.kernels.checking import disagreement, is_sound
from nested_core.kernels.constants import constant

WIDTH = 16  # bytes of a load
MOST = 128  # arrays a launch: their addresses are arguments, of which there are 4 KB
BLOCKS = 4  # for each array
THREADS = 256

Join = Callable[[Sequence[mx.array]], mx.array]


def joined(arrays: Sequence[mx.array]) -> mx.array:
    """The elements of all arrays in their order; they are of one dtype."""
    if len(arrays) > 1 and all(a.nbytes % WIDTH == 0 for a in arrays) and kernel_agrees():
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
    ends = tuple(accumulate(array.nbytes // WIDTH for array in arrays))
    (found,) = _kernel(len(arrays))(
        inputs=[*arrays, constant(ends)],
        grid=(BLOCKS * THREADS, len(arrays), 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(sum(array.size for array in arrays),)],
        output_dtypes=[arrays[0].dtype],
    )
    result: mx.array = found
    return result


@cache
def _kernel(count: int) -> Any:
    names = [f"a{i}" for i in range(count)]
    cases = " ".join(f"case {i}: from = a{i}; break;" for i in range(count))
    source = f"""
    const void* from = nullptr;
    switch (blockIdx.y) {{ {cases} }}
    int start = blockIdx.y ? ends[blockIdx.y - 1] : 0, end = ends[blockIdx.y];
    const uint4* source = reinterpret_cast<const uint4*>(from);
    uint4* target = reinterpret_cast<uint4*>(out) + start;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < end - start;
         i += gridDim.x * blockDim.x) target[i] = source[i];
    """
    return mx.fast.cuda_kernel(
        name=f"join_{count}", input_names=[*names, "ends"], output_names=["out"], source=source
    )


@cache
def kernel_agrees() -> bool:
    """Whether the kernel gives what MLX does on this machine; a warning where it does not."""
    return backend.has_cuda() and is_sound("joining arrays", trouble_with(join_on_cuda))


def trouble_with(join: Join) -> str | None:
    """What is wrong with such a function, or None."""
    sizes = 8, 4096, 24
    arrays = [mx.arange(size, dtype=mx.float32).astype(mx.bfloat16) for size in sizes]
    return disagreement(lambda: [join(arrays)], [plain_join(arrays)])
