"""RMS normalisation's backward pass on CUDA without the gradient of a weight that is frozen.

MLX always computes both, in three kernels; with the weight frozen one is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core import backend
from nested_core.kernels.checking import disagreement, is_sound
from nested_core.kernels.constants import constant
from nested_core.kernels.replacing import standing_in

WIDTH = 8  # elements of a load: 16 bytes of bfloat16
MOST_THREADS = 128
LONGEST = 16 * WIDTH * MOST_THREADS  # a row that a block keeps in registers
HALF_TYPES = (mx.bfloat16, mx.float16)

# A block takes a row. With i = 1 / sqrt(mean(x^2) + eps): dx = w g i - x i^3 mean(w g x).
SOURCE = f"""
    constexpr int W = {WIDTH};
    struct alignas(16) Pack {{ T value[W]; }};
    __shared__ float sums[2][32];
    int n = x_shape[1], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long row = (long)blockIdx.x * n;
    Pack given[PACKS], scaled[PACKS];
    float square = 0, along = 0;
    #pragma unroll
    for (int p = 0; p < PACKS; ++p) {{
        int at = (p * blockDim.x + threadIdx.x) * W;
        if (at < n) {{
            given[p] = *reinterpret_cast<const Pack*>(x + row + at);
            scaled[p] = *reinterpret_cast<const Pack*>(g + row + at);
        }}
    }}
    #pragma unroll
    for (int p = 0; p < PACKS; ++p) {{
        int at = (p * blockDim.x + threadIdx.x) * W;
        if (at < n) {{
            Pack weight = *reinterpret_cast<const Pack*>(w + at);
            #pragma unroll
            for (int k = 0; k < W; ++k) {{
                float a = static_cast<float>(given[p].value[k]);
                float b = static_cast<float>(scaled[p].value[k]);
                square += a * a;
                along += a * b * static_cast<float>(weight.value[k]);
            }}
        }}
    }}
    #pragma unroll
    for (int o = 16; o > 0; o /= 2) {{
        square += __shfl_xor_sync(0xffffffff, square, o);
        along += __shfl_xor_sync(0xffffffff, along, o);
    }}
    if (lane == 0) {{ sums[0][warp] = square; sums[1][warp] = along; }}
    __syncthreads();
    square = along = 0;
    for (int i = 0; i < blockDim.x / 32; ++i) {{ square += sums[0][i]; along += sums[1][i]; }}
    float inverse = rsqrtf(square / n + eps[0]);
    float factor = along / n * inverse * inverse * inverse;
    #pragma unroll
    for (int p = 0; p < PACKS; ++p) {{
        int at = (p * blockDim.x + threadIdx.x) * W;
        if (at < n) {{
            Pack weight = *reinterpret_cast<const Pack*>(w + at);
            #pragma unroll
            for (int k = 0; k < W; ++k) {{
                float b = static_cast<float>(scaled[p].value[k]);
                given[p].value[k] = static_cast<T>(
                    b * static_cast<float>(weight.value[k]) * inverse
                    - static_cast<float>(given[p].value[k]) * factor);
            }}
            *reinterpret_cast<Pack*>(dx + row + at) = given[p];
        }}
    }}
"""

Backward = Callable[[mx.array, mx.array, float, mx.array], mx.array]


def plain_backward(x: mx.array, weight: mx.array, eps: float, g: mx.array) -> mx.array:
    """The gradient with respect to x, by MLX."""
    return mx.vjp(lambda x: mx.fast.rms_norm(x, weight, eps), [x], [g])[1][0]


def backward_on_cuda(x: mx.array, weight: mx.array, eps: float, g: mx.array) -> mx.array:
    """The same in one kernel, for half precision and rows of a multiple of WIDTH elements."""
    n = x.shape[-1]
    threads = min(MOST_THREADS, -(-n // (32 * WIDTH)) * 32)
    (found,) = _kernel()(
        inputs=[x.reshape(-1, n), weight, constant((eps,)), g.reshape(-1, n)],
        template=[("T", x.dtype), ("PACKS", -(-n // (WIDTH * threads)))],
        grid=(x.size // n * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(x.size // n, n)],
        output_dtypes=[x.dtype],
    )
    result: mx.array = found.reshape(x.shape)
    return result


@cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="rms_norm_backward",
        input_names=["x", "w", "eps", "g"],
        output_names=["dx"],
        source=SOURCE,
    )


def normed_by(module: nn.RMSNorm, backward: Backward) -> Callable[[mx.array], mx.array]:
    """A call in the place of a norm's own, for a weight that no gradient is taken of."""

    @mx.custom_function
    def norm(x: mx.array) -> Any:
        return mx.fast.rms_norm(x, module.weight, module.eps)

    @norm.vjp
    def _(x: mx.array, cotangent: mx.array, output: mx.array) -> Any:
        return backward(x, module.weight, module.eps, cotangent)

    def call(x: mx.array) -> mx.array:
        fits = x.shape[-1] % WIDTH == 0 and x.shape[-1] <= LONGEST
        if not fits or x.dtype not in HALF_TYPES or x.dtype != module.weight.dtype:
            return mx.fast.rms_norm(x, module.weight, module.eps)
        function: Any = norm
        result: mx.array = function(x)
        return result

    return call


@contextmanager
def frozen_norms(model: nn.Module) -> Iterator[None]:
    """Have the backward pass of a model's frozen norms in one kernel while the block runs."""
    with ExitStack() as stack:
        if backend.has_cuda() and _agrees_here():
            for _, module in model.named_modules():
                if type(module) is nn.RMSNorm and not module.trainable_parameters():
                    call = normed_by(module, backward_on_cuda)
                    stack.enter_context(standing_in(module, call))
        yield


@cache
def _agrees_here() -> bool:
    return is_sound("norms", trouble_with(backward_on_cuda))


def trouble_with(backward: Backward) -> str | None:
    """What is wrong with such a function, or None; rows are of several loads a thread."""
    keys = mx.random.split(mx.random.key(0), 3)
    shapes = (5, 2600), (2600,), (5, 2600)
    parts = (
        mx.random.normal(s, key=k).astype(mx.bfloat16) for s, k in zip(shapes, keys, strict=True)
    )
    x, weight, g = parts
    return disagreement(
        lambda: [backward(x, weight, 1e-5, g)], [plain_backward(x, weight, 1e-5, g)]
    )
