"""silu(gate) * x on a CPU, with a backward pass that computes no exponential.

The exponential takes most of the time there. On other devices mlx-lm's own function, or a room's
kernel, is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

from nested_core import backend
from nested_core.kernels.exponential import exponential
from nested_core.kernels.patching import replacing_function

plain_swiglu: Any = activations.swiglu


def swiglu_on_cpu(gate: mx.array, x: mx.array) -> mx.array:
    """Compute mlx-lm's swiglu, within rounding.

    In float32 the sigmoid is stored for the backward pass; other dtypes use mlx-lm's function.
    """
    if not gate.dtype == x.dtype == mx.float32:
        return cast(mx.array, plain_swiglu(gate, x))
    output, _ = cast(tuple[mx.array, mx.array], _swiglu_and_sigmoid(gate, x))
    return output


@mx.custom_function
def _swiglu_and_sigmoid(gate: mx.array, x: mx.array) -> Any:
    """Return silu(gate) * x, and sigmoid(gate) for the backward pass."""
    s = 1 / (1 + exponential(-gate))
    return gate * s * x, s


@_swiglu_and_sigmoid.vjp
def _swiglu_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    """Compute the gradients of gate and x from the stored sigmoid.

    primals: gate and x. cotangents: the gradient of the output first.
    """
    gate, x = primals
    _, s = outputs
    scaled = cotangents[0] * s
    return scaled * x * (1 + gate * (1 - s)), scaled * gate


@contextmanager
def using_cpu_swiglu(model: nn.Module) -> Iterator[None]:
    """On a CPU, use `swiglu_on_cpu` in the code of a model's modules during the block."""
    if backend.device() != "cpu":
        yield
        return
    with replacing_function(model, "swiglu", plain_swiglu, swiglu_on_cpu):
        yield
