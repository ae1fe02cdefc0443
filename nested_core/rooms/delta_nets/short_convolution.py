"""Convolutions of a few tokens in each channel alone, as gated delta nets have them.

MLX computes them as any convolution, which takes some 20 times as long on a CPU. Here the sum is
written out: elementwise operations on a few shifted views.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from nested_core.kernels.patching import replacing_calls

LONGEST_KERNEL = 8  # tokens


@mx.custom_function
def convolve_channels(x: mx.array, weight: mx.array) -> Any:
    """Compute y_t = sum_i weight_i x_(t + i): (batch, length + n - 1, channels), (channels, n)."""
    n = weight.shape[1]
    length = x.shape[1] - n + 1
    return sum(x[:, i : i + length] * weight[:, i] for i in range(n))


@convolve_channels.vjp
def _convolve_channels_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    x, weight = primals
    n, length = weight.shape[1], cotangent.shape[1]
    padded = mx.pad(cotangent, [(0, 0), (n - 1, n - 1), (0, 0)])
    d_x = sum(padded[:, n - 1 - i : 2 * n - 2 - i + length] * weight[:, i] for i in range(n))
    taps = [(cotangent * x[:, i : i + length]).sum(axis=(0, 1)) for i in range(n)]
    return d_x, mx.stack(taps, axis=-1)


def make_convolution_call(module: nn.Conv1d) -> Callable[[mx.array], mx.array]:
    """Return a call in place of the convolution's own."""

    def call(x: mx.array) -> mx.array:
        """Convolve as nn.Conv1d does, (batch, length, channels)."""
        output = cast(mx.array, convolve_channels(x, module.weight[..., 0]))
        return output + module.bias if "bias" in module else output

    return call


def is_short_channel_convolution(module: nn.Module) -> bool:
    """Return whether a module is a convolution of a few tokens with a kernel for each channel."""
    return (
        type(module) is nn.Conv1d
        and module.groups == module.weight.shape[0]
        and module.weight.shape[1] <= LONGEST_KERNEL
        and module.weight.shape[2] == 1
        and (module.stride, module.padding, module.dilation) == (1, 0, 1)
    )


def using_short_convolutions(model: nn.Module) -> AbstractContextManager[None]:
    """Compute a model's short convolutions as shifted sums while the block runs."""
    return replacing_calls(
        (module, make_convolution_call(module))
        for _, module in model.named_modules()
        if is_short_channel_convolution(module)
    )
