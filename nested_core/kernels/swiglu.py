"""silu(gate) * x with a backward pass of its own: on CUDA in one kernel, on a CPU without an exp.

MLX's compiled backward keeps and passes over more arrays than the two gradients that are wanted,
and an exponential is what a CPU spends its time on. A kernel that does not agree with MLX on this
machine is not used, and a warning says so. On Metal mlx-lm's own is left alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

from nested_core import backend
from nested_core.kernels.exponential import exponential
from nested_core.kernels.replacing import in_code_of
from nested_core.scalars import to_float

WIDTH = 8  # elements a thread: 16 bytes of bfloat16
THREADS = 256
HALF_TYPES = (mx.bfloat16, mx.float16)
TOLERANCE = 0.02  # of the largest gradient: three roundings of a bfloat16

# One thread takes WIDTH neighbours; n is a multiple of it. With s = sigmoid(gate):
# d gate = g x s (1 + gate (1 - s)), d x = g gate s, in float32.
SOURCE = f"""
    unsigned int n = gate_shape[0];
    unsigned int i = (blockIdx.x * blockDim.x + threadIdx.x) * {WIDTH};
    if (i >= n) return;
    struct alignas(16) Pack {{ T value[{WIDTH}]; }};
    Pack gates = *reinterpret_cast<const Pack*>(gate + i);
    Pack others = *reinterpret_cast<const Pack*>(x + i);
    Pack given = *reinterpret_cast<const Pack*>(g + i);
    Pack to_gate, to_x;
    #pragma unroll
    for (int k = 0; k < {WIDTH}; ++k) {{
        float a = static_cast<float>(gates.value[k]);
        float b = static_cast<float>(others.value[k]);
        float c = static_cast<float>(given.value[k]);
        float s = 1.f / (1.f + __expf(-a));
        to_gate.value[k] = static_cast<T>(c * b * (s + a * s * (1.f - s)));
        to_x.value[k] = static_cast<T>(c * a * s);
    }}
    *reinterpret_cast<Pack*>(d_gate + i) = to_gate;
    *reinterpret_cast<Pack*>(d_x + i) = to_x;
"""

Backward = Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]
plain_swiglu: Any = activations.swiglu


def backward(gate: mx.array, x: mx.array, g: mx.array) -> tuple[mx.array, mx.array]:
    """The kernel's formula in MLX's operations: gradients with respect to gate and x."""
    a, b, c = (each.astype(mx.float32) for each in (gate, x, g))
    s = mx.sigmoid(a)
    return (c * b * (s + a * s * (1 - s))).astype(gate.dtype), (c * a * s).astype(x.dtype)


@cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="swiglu_backward",
        input_names=["gate", "x", "g"],
        output_names=["d_gate", "d_x"],
        source=SOURCE,
    )


def backward_on_cuda(gate: mx.array, x: mx.array, g: mx.array) -> tuple[mx.array, mx.array]:
    """The same in one kernel, for half-precision arrays of a multiple of WIDTH elements."""
    d_gate, d_x = _kernel()(
        inputs=[each.reshape(-1) for each in (gate, x, g)],
        template=[("T", gate.dtype)],
        grid=(gate.size // WIDTH, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(gate.size,)] * 2,
        output_dtypes=[gate.dtype] * 2,
    )
    return d_gate.reshape(gate.shape), d_x.reshape(x.shape)


def swiglu_with(backward: Backward) -> Callable[[mx.array, mx.array], mx.array]:
    """mlx-lm's swiglu with another backward pass, where its kernel takes the arrays."""

    @mx.custom_function
    def swiglu(gate: mx.array, x: mx.array) -> Any:
        return plain_swiglu(gate, x)

    @swiglu.vjp
    def _(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
        return backward(primals[0], primals[1], cotangent)

    fused: Any = swiglu

    def chosen(gate: mx.array, x: mx.array) -> mx.array:
        """The fused function for arrays that its kernel takes, else mlx-lm's."""
        fits = gate.dtype == x.dtype and gate.shape == x.shape and gate.size % WIDTH == 0
        result: mx.array = (
            fused(gate, x) if fits and gate.dtype in HALF_TYPES else plain_swiglu(gate, x)
        )
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
        function = swiglu_with(backward_on_cuda)
    with nullcontext() if function is None else in_code_of(model, "swiglu", plain_swiglu, function):
        yield


@cache
def _agrees_here() -> bool:
    """Whether the kernel gives MLX's own gradients on this machine; a warning where it does not."""
    trouble = disagreement(backward_on_cuda)
    if trouble is not None:
        warnings.warn(
            f"Our CUDA kernel for swiglu's backward pass is not used: {trouble}. MLX's own is.",
            stacklevel=2,
        )
    return trouble is None


def disagreement(backward: Backward) -> str | None:
    """What is wrong with a backward pass against MLX's own, or None."""
    keys = mx.random.split(mx.random.key(0), 3)
    gate, x, g = (mx.random.normal((37, 72), key=key).astype(mx.bfloat16) for key in keys)
    _, expected = mx.vjp(lambda a, b: plain_swiglu(a, b), [4 * gate, x], [g])
    try:
        found = backward(4 * gate, x, g)
        mx.eval(found)
    except RuntimeError as error:
        return f"it failed: {' '.join(str(error).split())[:200]}"
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = ours.astype(mx.float32), theirs.astype(mx.float32)
        largest = to_float(mx.abs(theirs).max())
        difference = to_float(mx.abs(ours - theirs).max())
        if not difference <= TOLERANCE * largest:
            return f"it differs by {difference:.3g} where gradients are up to {largest:.3g}"
    return None
