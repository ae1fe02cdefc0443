"""Gated MLPs of experts with LoRA: products over all experts at once, rows sorted by gathers.

mlx-lm repeats each token for its experts, sorts the rows by expert and multiplies the factors of
each expert with its rows alone. Narrow products of few rows each are slow on CUDA, and so are the
gradients of both indexings, which are added in place. Here a token meets the factors of all experts
in one product before it is repeated, and what other experts' factors gave is set to 0.

Rows stay (rows, 1, width) throughout: MLX 0.32's gather_mm of sorted rows on CUDA takes an axis of
1 that `x[:, None]` made for another layout, and its output is of other rows, without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.tuner.lora import LoRASwitchLinear

from nested_core import backend
from nested_core.kernels.patching import replacing_calls

FEWEST_SORTED_ROWS = 64  # as in mlx_lm.models.switch_layers
MOST_COLUMNS = 512  # experts x rank: with more, MLX's own products are faster and hold less


def _take_rows(x: mx.array, order: mx.array, inverse: mx.array) -> mx.array:
    """Return the rows of x, (rows, ...), each repeated `order.size // rows` times, in this order.

    `order` is a permutation of the repeated rows and `inverse` the one that undoes it. The gradient
    gathers rows by the inverse; MLX's gradient of indexing would add rows in place, one by one.
    """
    return x[order // (order.size // x.shape[0])]


take_rows: Any = mx.custom_function(_take_rows)


@take_rows.vjp  # type: ignore[untyped-decorator] # take_rows is Any: MLX types it as object
def _take_rows_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    x, order, inverse = primals
    repeated = cotangent[inverse].reshape(x.shape[0], -1, *x.shape[1:])
    return repeated.sum(axis=1), mx.zeros_like(order), mx.zeros_like(inverse)


def make_expert_mlp_call(mlp: Any) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a call for an MLP of experts that multiplies the rows of each expert together.

    Like mlx-lm's, it takes inputs (..., width) and the indices of each one's experts (..., active),
    and returns (..., active, width). Few rows are passed to mlx-lm's call.
    """
    original = type(mlp)

    def call(x: mx.array, indices: mx.array) -> mx.array:
        """Compute down(activation(up, gate)) of each token's experts.

        A row is a token for one of its experts. Rows are sorted by expert, so that each expert's
        weights are read once, and put back in the order of the tokens at the end.
        """
        if indices.size < FEWEST_SORTED_ROWS:
            return cast(mx.array, original.__call__(mlp, x, indices))
        expert_of_row = mx.stop_gradient(indices).flatten()
        order = mx.argsort(expert_of_row)
        inverse = mx.argsort(order)
        experts = expert_of_row[order]
        tokens = x.reshape(-1, 1, x.shape[-1])
        rows = take_rows(tokens, order, inverse)

        def project_repeated(layer: LoRASwitchLinear) -> mx.array:
            """Project each token once, for all experts, and return its rows."""
            return cast(mx.array, take_rows(project_to_experts(layer, tokens), order, inverse))

        up = layer_output(mlp.up_proj, rows, experts, project_repeated)
        inner = mlp.activation(up, layer_output(mlp.gate_proj, rows, experts, project_repeated))
        output = layer_output(mlp.down_proj, inner, experts, partial(project_to_experts, x=inner))
        unsorted: mx.array = take_rows(output, inverse, order)  # the order of the tokens
        return unsorted.reshape(*indices.shape, -1)

    return call


def multiplies_all_experts(layer: Any, dtype: mx.Dtype) -> bool:
    """Tell whether a layer is LoRA on experts of x's dtype, without dropout, of few columns."""
    return (
        type(layer) is LoRASwitchLinear
        and layer.dropout._p_1 == 1
        and layer.lora_a.shape[0] * layer.lora_a.shape[1] <= MOST_COLUMNS
        and layer.lora_a.dtype == layer.lora_b.dtype == dtype
    )


def project_to_experts(layer: LoRASwitchLinear, x: mx.array) -> mx.array:
    """Compute x @ lora_a of all experts: (rows, 1, width) to (rows, experts * rank)."""
    return x.reshape(-1, x.shape[-1]) @ layer.lora_a.reshape(-1, x.shape[-1]).T


def layer_output(
    layer: Any, rows: mx.array, experts: mx.array, project: Callable[[LoRASwitchLinear], mx.array]
) -> mx.array:
    """Add scale * z @ lora_b to the base's output; z counts in a row's own expert alone.

    rows are (rows, 1, width), experts (rows,), ascending, and z = project(layer) is (rows,
    experts * rank). A layer that `multiplies_all_experts` says no to is computed by mlx-lm.
    """
    if not multiplies_all_experts(layer, rows.dtype):
        return cast(mx.array, layer(rows, experts, sorted_indices=True))
    count, width, rank = layer.lora_b.shape
    base = layer.linear(rows, experts, sorted_indices=True)
    own = experts[:, None] == mx.repeat(mx.arange(count, dtype=experts.dtype), rank)
    z = mx.where(own, layer.scale * project(layer), 0)
    factors = layer.lora_b.swapaxes(1, 2).reshape(-1, width)
    return mx.addmm(base.reshape(-1, width), z, factors).reshape(base.shape)


def find_expert_mlps(model: nn.Module) -> list[SwitchGLU]:
    """Find the gated MLPs of experts that are computed here, on CUDA; elsewhere none."""
    if not backend.computes_on_cuda():
        return []
    return [module for _, module in model.named_modules() if type(module) is SwitchGLU]


def find_expert_layers(model: nn.Module) -> list[LoRASwitchLinear]:
    """Return the layers with LoRA on experts whose factors are multiplied all at once."""
    layers = [each for mlp in find_expert_mlps(model) for each in mlp.children().values()]
    return [
        each
        for each in layers
        if "lora_a" in each and multiplies_all_experts(each, each.lora_a.dtype)
    ]


def using_expert_mlps(model: nn.Module) -> AbstractContextManager[None]:
    """Compute a model's gated MLPs of experts as above, on CUDA, while the block runs."""
    mlps = find_expert_mlps(model)
    return replacing_calls((mlp, make_expert_mlp_call(mlp)) for mlp in mlps)
