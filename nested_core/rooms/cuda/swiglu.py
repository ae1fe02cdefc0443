"""silu(gate) * x in a kernel for each pass.

MLX's compiled backward pass keeps and reads more arrays than the two gradients need.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from nested_core.kernels.patching import replacing_function
from nested_core.kernels.self_check import checked_kernel, random_arrays
from nested_core.rooms.cuda.call_tracing import plain_swiglu
from nested_core.rooms.cuda.kernel_launch import (
    ELEMENTS_PER_LOAD,
    KERNEL_DTYPE,
    MAX_THREADS_PER_BLOCK,
    launch_kernel,
)

Swiglu = Callable[[mx.array, mx.array], mx.array]
Gradients = Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]


def swiglu_gradients_in_mlx(gate: mx.array, x: mx.array, g: mx.array) -> tuple[mx.array, mx.array]:
    """Return the kernel's formula in MLX's operations: gradients with respect to gate and x."""
    a, b, c = gate.astype(mx.float32), x.astype(mx.float32), g.astype(mx.float32)
    s = mx.sigmoid(a)
    return (c * b * (s + a * s * (1 - s))).astype(gate.dtype), (c * a * s).astype(x.dtype)


def _example_inputs() -> list[tuple[mx.array, mx.array, mx.array]]:
    gate, x, g = random_arrays((37, 72), (37, 72), (37, 72))
    return [(4 * gate, x, g)]


@checked_kernel("swiglu", reference=plain_swiglu, examples=lambda: [_example_inputs()[0][:2]])
def swiglu_on_cuda(gate: mx.array, x: mx.array) -> mx.array:
    """Compute silu(gate) * x in one kernel, for bfloat16 arrays of whole loads."""
    return _launch_elementwise("swiglu", [gate, x], 1)[0]


@checked_kernel("swiglu", reference=swiglu_gradients_in_mlx, examples=_example_inputs)
def swiglu_gradients_on_cuda(gate: mx.array, x: mx.array, g: mx.array) -> tuple[mx.array, mx.array]:
    """Return the gradients with respect to gate and x in one kernel, for such arrays."""
    d_gate, d_x = _launch_elementwise("swiglu_gradients", [gate, x, g], 2)
    return d_gate, d_x


def _launch_elementwise(name: str, arrays: list[mx.array], outputs: int) -> list[mx.array]:
    """Launch a kernel that reads arrays of one shape and dtype, and fills others like them."""
    first = arrays[0]
    loads = first.size // ELEMENTS_PER_LOAD
    return launch_kernel(
        name,
        arrays,
        [(first.shape, first.dtype)] * outputs,
        [loads],
        blocks=(-(-loads // MAX_THREADS_PER_BLOCK), 1),
    )


def make_swiglu(forward: Swiglu, gradients: Gradients) -> Swiglu:
    """Make mlx-lm's swiglu with other passes, for arrays that fit their kernels."""

    @mx.custom_function
    def fused(gate: mx.array, x: mx.array) -> Any:
        return forward(gate, x)

    @fused.vjp
    def _(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        gate, x = primals
        return gradients(gate, x, cotangent.astype(x.dtype))

    def swiglu(gate: mx.array, x: mx.array) -> mx.array:
        """Return the fused function for arrays that fit its kernels, else mlx-lm's."""
        are_alike = gate.dtype == x.dtype and gate.shape == x.shape
        fits = are_alike and gate.size % ELEMENTS_PER_LOAD == 0 and gate.dtype == KERNEL_DTYPE
        return cast(mx.array, fused(gate, x) if fits else plain_swiglu(gate, x))

    return swiglu


def using_swiglu_kernels(model: nn.Module) -> AbstractContextManager[None]:
    """Use the kernels in the code of a model's modules while the block runs."""
    if not (swiglu_on_cuda.is_usable() and swiglu_gradients_on_cuda.is_usable()):
        return nullcontext()
    function = make_swiglu(swiglu_on_cuda, swiglu_gradients_on_cuda)
    return replacing_function(model, "swiglu", plain_swiglu, function)
