"""Gated MLPs of LoRA layers, computed as one function with a backward pass of its own, on CUDA.

What the LoRA layers add is added where gate and up are read, and where their gradient is: no array
is made for it. The product of silu(gate) and up is recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.tuner.lora import LoRALinear

from nested_core import backend
from nested_core.kernels.device_operations import has_kernel_for_rank
from nested_core.kernels.patching import replacing_calls
from nested_core.kernels.views import split_rows, swap_axes
from nested_core.rooms.cuda import gated_mlp as mlp_kernels
from nested_core.rooms.cuda import lora_linear
from nested_core.rooms.cuda.call_tracing import CallTrace, GatedMLP, find_gated_mlps
from nested_core.rooms.cuda.concatenate import concatenate_rows
from nested_core.rooms.cuda.gated_mlp import gated_gradients_on_cuda, gated_product_on_cuda
from nested_core.rooms.cuda.kernel_launch import tiles_of_smallest_kernel
from nested_core.rooms.cuda.lora_add import LowRankSumTerms, can_use_lora_kernels
from nested_core.rooms.cuda.lora_matmuls import (
    check_lora_kernels,
    factor_gradients,
    project_to_rank,
)


class MLPFactors(NamedTuple):
    """The LoRA factors of a gated MLP's three layers: a^T (rank, input), b (rank, output)."""

    a_gate: mx.array
    a_up: mx.array
    a_down: mx.array
    b_gate: mx.array
    b_up: mx.array
    b_down: mx.array


def find_fusable_mlps(trace: CallTrace) -> list[GatedMLP]:
    """Return the gated MLPs of LoRA layers for which there are kernels that agree with MLX."""
    if not backend.computes_on_cuda():
        return []
    return [mlp for mlp in find_gated_mlps(trace) if _mlp_has_kernels(mlp)]


def _mlp_has_kernels(mlp: GatedMLP) -> bool:
    gate, up, down = (layer.lora_b.shape[0] for layer in mlp.layers)
    if not (has_kernel_for_rank(gate) and has_kernel_for_rank(up) and has_kernel_for_rank(down)):
        return False
    check_lora_kernels([gate, up, down, gate + up])
    variants = {
        tiles_of_smallest_kernel(max(gate, up)),
        tiles_of_smallest_kernel(max(gate, up, down)),
    }  # forwards, backwards
    kernels = gated_product_on_cuda, gated_gradients_on_cuda
    return all(kernel.is_usable(tiles) for tiles in variants for kernel in kernels)


def using_fused_mlps(mlps: Sequence[GatedMLP]) -> AbstractContextManager[None]:
    """Compute these modules as one function each while the block runs."""
    return replacing_calls((mlp.module, make_fused_mlp_call(mlp)) for mlp in mlps)


def make_fused_mlp_call(mlp: GatedMLP) -> Callable[[mx.array], mx.array]:
    """Replace the module's call, which still computes what does not fit the kernels."""
    own: Callable[..., mx.array] = type(mlp.module).__call__
    gate, up, down = mlp.layers
    function: Any = _make_fused_function(mlp)

    def call(x: mx.array) -> mx.array:
        """Return the MLP's output, (..., width), as one function where it can be."""
        a_factors = [swap_axes(layer.lora_a, 0, 1) for layer in mlp.layers]
        b_factors = [gate.lora_b, up.lora_b, down.lora_b]
        fits = can_use_lora_kernels(x, a_factors + b_factors)
        if not fits or any(map(uses_dropout, mlp.layers)):
            return own(mlp.module, x)
        output: mx.array = function(x.reshape(-1, x.shape[-1]), *a_factors, *b_factors)[0]
        return output.reshape(*x.shape[:-1], -1)

    return call


def uses_dropout(layer: LoRALinear) -> bool:
    """Return whether dropout is applied to the input of a layer's low-rank path."""
    return bool(layer.dropout.training) and layer.dropout._p_1 < 1


def _make_fused_function(mlp: GatedMLP) -> Any:
    """Make down(silu(gate) up) with its backward pass; x and outputs are (rows, width)."""
    gate, up, down = mlp.layers
    ranks = [layer.lora_b.shape[0] for layer in (gate, up)]

    @mx.custom_function
    def forward(x: mx.array, *arrays: mx.array) -> list[mx.array]:
        """Return output, base outputs of gate and up, both lora_a^T, and each layer's z."""
        factors = MLPFactors._make(arrays)
        a = concatenate_rows([factors.a_gate, factors.a_up])
        z_gate, z_up = split_rows(project_to_rank([(a, x)], gate.scale), ranks)
        gate_base, up_base = lora_linear.base_output(gate, x), lora_linear.base_output(up, x)
        inner = mlp_kernels.gated_product(
            LowRankSumTerms(gate_base, z_gate, factors.b_gate),
            LowRankSumTerms(up_base, z_up, factors.b_up),
        )
        z_down = project_to_rank([(factors.a_down, inner)], down.scale)
        (output,) = lora_linear.add_low_rank_products([down], inner, [z_down], [factors.b_down])
        return [output, gate_base, up_base, a, z_gate, z_up, z_down]

    @forward.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        """Return the gradients with respect to the input and each factor."""
        x, factors = primals[0], MLPFactors._make(primals[1:])
        g = cotangents[0]
        _, gate_base, up_base, a, z_gate, z_up, z_down = outputs
        dz_down = project_to_rank([(factors.b_down, g)], down.scale)
        d_inner = lora_linear.base_input_gradient([down], gate_base, [g])
        d_gate, d_up, inner = mlp_kernels.gated_gradients(
            LowRankSumTerms(gate_base, z_gate, factors.b_gate),
            LowRankSumTerms(up_base, z_up, factors.b_up),
            LowRankSumTerms(d_inner, dz_down, factors.a_down),
        )
        dz = project_to_rank([(factors.b_gate, d_gate), (factors.b_up, d_up)], gate.scale)
        dx = lora_linear.input_gradient([gate, up], x, [d_gate, d_up], dz, a)
        da, db_gate, db_up, db_down, da_down = factor_gradients(
            [(dz, x), (z_gate, d_gate), (z_up, d_up), (z_down, g), (dz_down, inner)]
        )
        return dx, *split_rows(da, ranks), da_down, db_gate, db_up, db_down

    return forward
