"""silu(gate) * x with passes of its own: on CUDA a kernel each, on a CPU backwards without an exp.

MLX's compiled backward keeps and passes over more arrays than the two gradients that are wanted,
and an exponential is what a CPU spends its time on. Kernels that do not agree with MLX on this
machine are not used, and a warning says so. On Metal mlx-lm's own is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

from nested_core import backend
from nested_core.kernels.cuda.launch import DTYPE, THREADS, WIDTH, launch
from nested_core.kernels.cuda.self_check import disagreement, is_sound
from nested_core.kernels.exponential import exponential
from nested_core.kernels.patching import in_code_of

Forward = Callable[[mx.array, mx.array], mx.array]
Backward = Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]
plain_swiglu: Any = activations.swiglu


def plain_backward(gate: mx.array, x: mx.array, g: mx.array) -> tuple[mx.array, mx.array]:
    """The kernel's formula in MLX's operations: gradients with respect to gate and x."""
    a, b, c = (each.astype(mx.float32) for each in (gate, x, g))
    s = mx.sigmoid(a)
    return (c * b * (s + a * s * (1 - s))).astype(gate.dtype), (c * a * s).astype(x.dtype)


def forward_on_cuda(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x in one kernel, for bfloat16 arrays of a multiple of WIDTH elements."""
    return _elementwise("swiglu", [gate, x], 1)[0]


def backward_on_cuda(gate: mx.array, x: mx.array, g: mx.array) -> tuple[mx.array, mx.array]:
    """The gradients with respect to gate and x in one kernel, for such arrays."""
    d_gate, d_x = _elementwise("swiglu_back", [gate, x, g], 2)
    return d_gate, d_x


def _elementwise(name: str, arrays: list[mx.array], outputs: int) -> list[mx.array]:
    """What a kernel gives that takes arrays of one shape and fills such."""
    shape, dtype, packs = arrays[0].shape, arrays[0].dtype, arrays[0].size // WIDTH
    return launch(
        name,
        arrays,
        [(shape, dtype)] * outputs,
        [packs],
        blocks=(-(-packs // THREADS), 1),
        threads=THREADS,
    )


def swiglu_with(forward: Forward, backward: Backward) -> Callable[[mx.array, mx.array], mx.array]:
    """mlx-lm's swiglu with other passes, where their kernels take the arrays."""

    @mx.custom_function
    def swiglu(gate: mx.array, x: mx.array) -> Any:
        return forward(gate, x)

    @swiglu.vjp
    def _(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        return backward(primals[0], primals[1], cotangent)

    fused: Any = swiglu

    def chosen(gate: mx.array, x: mx.array) -> mx.array:
        """The fused function for arrays that its kernels take, else mlx-lm's."""
        fits = gate.dtype == x.dtype and gate.shape == x.shape and gate.size % WIDTH == 0
        result: mx.array = fused(gate, x) if fits and gate.dtype == DTYPE else plain_swiglu(gate, x)
        return result

    return chosen


def swiglu_on_cpu(gate: mx.array, x: mx.array) -> mx.array:
    """mlx-lm's swiglu within rounding; in float32 the sigmoid is kept for the backward pass."""
    if not gate.dtype == x.dtype == mx.float32:
        result: mx.array = plain_swiglu(gate, x)
        return result
    outputs: Any = _keeping_sigmoid(gate, x)
    output: mx.array = outputs[0]
    return output


@mx.custom_function
def _keeping_sigmoid(gate: mx.array, x: mx.array) -> Any:
    s = 1 / (1 + exponential(-gate))
    return gate * s * x, s


@_keeping_sigmoid.vjp
def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
    (gate, x), through = primals, cotangents[0] * outputs[1]
    return through * x * (1 + gate * (1 - outputs[1])), through * gate


@contextmanager
def fused_swiglu(model: nn.Module) -> Iterator[None]:
    """Use what is fastest on this device in the code of a model's modules while the block runs."""
    function: Callable[..., mx.array] | None = None
    if backend.device() == "cpu":
        function = swiglu_on_cpu
    elif backend.has_cuda() and _agrees_here():
        function = swiglu_with(forward_on_cuda, backward_on_cuda)
    with nullcontext() if function is None else in_code_of(model, "swiglu", plain_swiglu, function):
        yield


@cache
def _agrees_here() -> bool:
    return is_sound("swiglu", trouble_with(forward_on_cuda, backward_on_cuda))


def trouble_with(forward: Forward, backward: Backward) -> str | None:
    """What is wrong with such passes against MLX's own, or None."""
    keys = mx.random.split(mx.random.key(0), 3)
    gate, x, g = (mx.random.normal((37, 72), key=key).astype(mx.bfloat16) for key in keys)
    gate = 4 * gate
    output, gradients = mx.vjp(lambda a, b: plain_swiglu(a, b), [gate, x], [g])
    return disagreement(lambda: [forward(gate, x), *backward(gate, x, g)], [*output, *gradients])
