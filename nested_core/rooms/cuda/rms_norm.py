"""RMS normalization's backward pass on CUDA without the gradient of a weight that is frozen.

MLX always computes both gradients, in three kernels; with the weight frozen one is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from nested_core.kernels.patching import replacing_calls
from nested_core.kernels.self_check import checked_kernel, random_arrays
from nested_core.rooms.cuda.kernel_launch import (
    ELEMENTS_PER_LOAD,
    KERNEL_DTYPE,
    MULTIPROCESSORS,
    launch_kernel,
)

MAX_THREADS = 128
COMPILED_LOADS_PER_THREAD = 1, 2, 4, 8, 16  # loads of a thread that a kernel is compiled for
MAX_BLOCKS = 8 * MULTIPROCESSORS  # each takes row after row
# That a block keeps in registers.
LONGEST_ROW = COMPILED_LOADS_PER_THREAD[-1] * ELEMENTS_PER_LOAD * MAX_THREADS

InputGradient = Callable[[mx.array, mx.array, float, mx.array], mx.array]


def input_gradient_in_mlx(x: mx.array, weight: mx.array, eps: float, g: mx.array) -> mx.array:
    """Return the gradient with respect to x, by MLX."""
    return mx.vjp(lambda x: mx.fast.rms_norm(x, weight, eps), [x], [g])[1][0]


def _example_inputs(width: int) -> list[tuple[mx.array, mx.array, float, mx.array]]:
    """Make rows of this width, so many that blocks take several."""
    rows = 2 * MAX_BLOCKS + 5
    x, weight, g = random_arrays((rows, width), (width,), (rows, width))
    return [(x, weight, 1e-5, g)]


@checked_kernel("norms", reference=input_gradient_in_mlx, examples=_example_inputs)
def input_gradient_on_cuda(x: mx.array, weight: mx.array, eps: float, g: mx.array) -> mx.array:
    """Return the same in one kernel, for bfloat16 and rows that fit."""
    n = x.shape[-1]
    threads = min(MAX_THREADS, -(-n // (32 * ELEMENTS_PER_LOAD)) * 32)
    return launch_kernel(
        "rms_norm_gradient",
        [x, weight, g],
        [(x.shape, x.dtype)],
        [x.size // n, n, eps],
        blocks=(min(x.size // n, MAX_BLOCKS), 1),
        threads=threads,
        PACKS=min(
            loads for loads in COMPILED_LOADS_PER_THREAD if loads * ELEMENTS_PER_LOAD * threads >= n
        ),
    )[0]


def _has_kernel_for_width(width: int) -> bool:
    return width % ELEMENTS_PER_LOAD == 0 and width <= LONGEST_ROW


def make_norm_call(
    module: nn.RMSNorm, input_gradient: InputGradient
) -> Callable[[mx.array], mx.array]:
    """Return a call in place of a norm's own, for a weight that no gradient is taken of."""

    @mx.custom_function
    def norm(x: mx.array) -> Any:
        return mx.fast.rms_norm(x, module.weight, module.eps)

    @norm.vjp
    def _(x: mx.array, cotangent: mx.array, output: mx.array) -> Any:
        return input_gradient(x, module.weight, module.eps, cotangent.astype(x.dtype))

    def call(x: mx.array) -> mx.array:
        """Return the norm with our backward pass for arrays that fit its kernel, else MLX's own."""
        if (
            not _has_kernel_for_width(x.shape[-1])
            or not x.dtype == module.weight.dtype == KERNEL_DTYPE
        ):
            return mx.fast.rms_norm(x, module.weight, module.eps)
        return cast(mx.array, norm(x))

    return call


def using_frozen_norms(model: nn.Module) -> AbstractContextManager[None]:
    """Compute the backward pass of a model's frozen norms in one kernel while the block runs."""
    norms = [module for _, module in model.named_modules() if type(module) is nn.RMSNorm]
    return replacing_calls(
        (module, make_norm_call(module, input_gradient_on_cuda))
        for module in norms
        if not module.trainable_parameters()
        and _has_kernel_for_width(module.weight.size)
        and input_gradient_on_cuda.is_usable(module.weight.size)
    )
