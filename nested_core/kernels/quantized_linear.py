"""Quantised layers whose weights are made whole for each product, and thrown away again.

MLX's own product with quantised weights is made for a few rows, as in generation. With as many as a
batch has, making the weight whole in the dtype of its scales and multiplying by that is faster: on
CUDA, and far more on a CPU with OpenBLAS (without it there is little in it). Where few rows come,
where scales are no floats (mxfp4 and its like), where they are trained, and on Metal, MLX's own is
left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core import backend
from nested_core.kernels.patching import standing_in

LEAST_ROWS = 16
OWN = {"weight", "scales", "biases"}  # no gradient is taken of these here
CALLS: dict[type, str] = {nn.QuantizedLinear: "__call__", nn.QuantizedEmbedding: "as_linear"}


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Have a model's quantised layers compute with whole weights while the block runs."""
    is_slower = backend.device() == "cpu" or backend.has_cuda()
    with ExitStack() as stack:
        for _, module in model.named_modules() if is_slower else ():
            name = CALLS.get(type(module))
            if name is not None and not module.trainable_parameters().keys() & OWN:
                stack.enter_context(standing_in(module, product_with(module, name), name))
        yield


def product_with(module: Any, name: str) -> Callable[[mx.array], mx.array]:
    """A method in the place of a quantised layer's own of that name."""
    own = getattr(type(module), name)

    @mx.custom_function
    def multiply(x: mx.array) -> Any:
        return x @ weight_of(module, x).T

    @multiply.vjp
    def _(x: mx.array, cotangent: mx.array, output: mx.array) -> Any:
        return cotangent @ weight_of(module, cotangent)

    def call(x: mx.array) -> mx.array:
        """x @ weight.T, and the bias where there is one."""
        if x.size < LEAST_ROWS * x.shape[-1] or x.dtype != module.scales.dtype:
            result: mx.array = own(module, x)
            return result
        function: Any = multiply
        output: mx.array = function(x)
        return output + module.bias if "bias" in module else output

    return call


def weight_of(module: Any, wanted_by: mx.array) -> mx.array:
    """A layer's weight (outputs, inputs) in the dtype of its scales, made once an array is there.

    Without what it depends on, mx.compile would make it once for both passes, and keep it.
    """
    (weight,) = mx.depends([module.weight], [wanted_by])
    return mx.dequantize(
        weight,
        module.scales,
        module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )
