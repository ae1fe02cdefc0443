"""Quantized layers that dequantize their weight for each product, without keeping it.

MLX's own product with quantized weights is made for a few rows, as in generation. With as many rows
as a batch has, it is faster to dequantize the weight to the dtype of its scales and to multiply by
that: on CUDA, and far more on a CPU with OpenBLAS (without it the difference is small). MLX's own
product is used for few rows, for scales that are no floats (mxfp4 and the like), for scales that
are trained, and on Metal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from nested_core import backend
from nested_core.kernels.patching import replacing_call

MIN_ROWS_TO_DEQUANTIZE = 16
QUANTIZED_WEIGHT_KEYS = {"weight", "scales", "biases"}  # no gradient is taken of these here
# Of `sharing_dequantized_weights`: the array after which weights are made, and those made so far.
_shared_weights: ContextVar[tuple[mx.array, dict[int, mx.array]] | None] = ContextVar(
    "shared_weights", default=None
)
METHODS: dict[type, str] = {nn.QuantizedLinear: "__call__", nn.QuantizedEmbedding: "as_linear"}


@contextmanager
def multiplying_by_dequantized_weights(model: nn.Module) -> Iterator[None]:
    """Let a model's quantized layers multiply by dequantized weights during the block."""
    is_faster = backend.device() == "cpu" or backend.computes_on_cuda()
    with ExitStack() as stack:
        for _, module in model.named_modules() if is_faster else ():
            method = METHODS.get(type(module))
            if method is None or module.trainable_parameters().keys() & QUANTIZED_WEIGHT_KEYS:
                continue
            product = make_dequantized_product(module, method)
            stack.enter_context(replacing_call(module, product, method))
        yield


def make_dequantized_product(module: nn.Module, method: str) -> Callable[[mx.array], mx.array]:
    """Return a replacement for a quantized layer's method that multiplies by its weight.

    method: `__call__` or `as_linear`.
    """
    original: Callable[..., mx.array] = getattr(type(module), method)

    @mx.custom_function
    def multiply(x: mx.array) -> object:
        """Compute x @ weight.T with the dequantized weight."""
        return x @ dequantize_weight(module, x).T

    @multiply.vjp
    def _(x: mx.array, cotangent: mx.array, output: mx.array) -> Any:
        """Compute the input's gradient: the output's gradient @ weight."""
        return cotangent @ dequantize_weight(module, cotangent)

    def product(x: mx.array) -> mx.array:
        """Compute x @ weight.T, plus the bias if the layer has one."""
        if x.size < MIN_ROWS_TO_DEQUANTIZE * x.shape[-1] or x.dtype != module.scales.dtype:
            return original(module, x)
        output = cast(mx.array, multiply(x))
        return output + module.bias if "bias" in module else output

    return product


@contextmanager
def sharing_dequantized_weights(computed_after: mx.array) -> Iterator[None]:
    """Dequantize each layer's weight once during the block, for all of its products.

    computed_after: an array that is computed before the weights.

    For products that follow each other, such as those of the output layer with chunks of a batch;
    the weight stays in memory until the last of them.
    """
    token = _shared_weights.set((computed_after, {}))
    try:
        yield
    finally:
        _shared_weights.reset(token)


def dequantize_weight(module: nn.Module, computed_after: mx.array) -> mx.array:
    """Return a layer's weight (outputs, inputs) in the dtype of its scales.

    computed_after: an array that is computed before the weight. Without this dependency mx.compile
        would dequantize once for both passes and keep the weight.
    """
    shared = _shared_weights.get()
    if shared is None:
        return _dequantize_after(module, computed_after)
    first, weights = shared
    if id(module) not in weights:
        weights[id(module)] = _dequantize_after(module, first)
    return weights[id(module)]


def _dequantize_after(module: nn.Module, computed_after: mx.array) -> mx.array:
    """Dequantize a layer's weight, after `computed_after` is computed."""
    (weight,) = mx.depends([module.weight], [computed_after])
    return mx.dequantize(
        weight,
        module.scales,
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
