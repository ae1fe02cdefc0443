"""Many small arrays concatenated into one vector, by one kernel on CUDA.

An adapter's gradients are hundreds of arrays, and MLX copies each with a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx

from nested_core.kernels.device_operations import concatenate_in_mlx
from nested_core.kernels.self_check import checked_kernel, random_arrays
from nested_core.rooms.cuda.kernel_launch import launch_kernel

LOAD_BYTES = 16
ARRAYS_PER_LAUNCH = 32  # their addresses are arguments
BLOCKS_PER_ARRAY = 4  # for each array


def concatenate_flattened(arrays: Sequence[mx.array]) -> mx.array:
    """Return the elements of arrays of one dtype as a vector, each array row by row."""
    dtype = arrays[0].dtype
    fits = all(array.nbytes % LOAD_BYTES == 0 and array.dtype == dtype for array in arrays)
    if len(arrays) == 1 or not fits or not concatenate_on_cuda.is_usable():
        return concatenate_in_mlx(arrays)
    while len(arrays) > 1:
        groups = range(0, len(arrays), ARRAYS_PER_LAUNCH)
        arrays = [concatenate_on_cuda(arrays[i : i + ARRAYS_PER_LAUNCH]) for i in groups]
    return arrays[0].reshape(-1)


def concatenate_rows(arrays: Sequence[mx.array]) -> mx.array:
    """Return matrices of one width, (rows of its own, width), one above the other."""
    if len(arrays) == 1:
        return arrays[0]
    return concatenate_flattened(arrays).reshape(-1, arrays[0].shape[1])


def _example_inputs() -> list[tuple[Sequence[mx.array]]]:
    sizes = 8, 16384, 24  # loads of the second go round twice
    return [(random_arrays(*((size,) for size in sizes)),)]


@checked_kernel("joining arrays", reference=concatenate_in_mlx, examples=_example_inputs)
def concatenate_on_cuda(arrays: Sequence[mx.array]) -> mx.array:
    """Run `concatenate_flattened` in one kernel, on at most ARRAYS_PER_LAUNCH whole-load arrays."""
    ends = list(accumulate(array.nbytes // LOAD_BYTES for array in arrays))
    missing = ARRAYS_PER_LAUNCH - len(arrays)
    return launch_kernel(
        "concatenate",
        [*arrays, *[arrays[-1]] * missing],
        [((sum(array.size for array in arrays),), arrays[0].dtype)],
        [*ends, *[ends[-1]] * missing],
        blocks=(BLOCKS_PER_ARRAY, len(arrays)),
        dtypes=[arrays[0].dtype],
    )[0]
