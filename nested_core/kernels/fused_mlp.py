"""Gated MLPs of LoRA layers, computed as one function with a backward pass of its own, on CUDA.

What the low-rank layers add is added where gate and up are read, and where their gradient is: no
array is made for it. The product of silu(gate) and up is not kept, but made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
from mlx_lm.tuner.lora import LoRALinear

from nested_core import backend
from nested_core.kernels.cuda.concatenate import joined
from nested_core.kernels.cuda.lora_add import LowRankSum, is_for_kernels
from nested_core.kernels.cuda.lora_matmuls import narrow, outer
from nested_core.kernels.cuda.mlp import gated, gated_back, kernels_agree
from nested_core.kernels.cuda.tiles import is_in_tiles, made_for
from nested_core.kernels.lora_linear import (
    check_low_rank,
    through,
    through_bases,
    with_low_rank,
)
from nested_core.kernels.patching import standing_in
from nested_core.kernels.tracing import Calls, GatedMLP, gated_mlps


def fusable_mlps(calls: Calls) -> list[GatedMLP]:
    """The MLPs that are computed here: those of LoRA layers, where kernels are sound."""
    if not backend.has_cuda():
        return []
    return [mlp for mlp in gated_mlps(calls) if _has_kernels(mlp)]


def _has_kernels(mlp: GatedMLP) -> bool:
    ranks = [layer.lora_b.shape[0] for layer in mlp.layers]
    if not all(map(is_in_tiles, ranks)):
        return False
    check_low_rank([*ranks, ranks[0] + ranks[1]])
    forwards, backwards = max(ranks[:2]), max(ranks)  # what each is compiled for
    return all(map(kernels_agree, {made_for(forwards), made_for(backwards)}))


@contextmanager
def fused_mlps(mlps: Sequence[GatedMLP]) -> Iterator[None]:
    """Have such modules computed here while the block runs."""
    with ExitStack() as stack:
        for mlp in mlps:
            stack.enter_context(standing_in(mlp.module, computed(mlp)))
        yield


def computed(mlp: GatedMLP) -> Callable[[mx.array], mx.array]:
    """A call in the place of the module's own, which is used for what the kernels do not take."""
    own, layers = type(mlp.module).__call__, mlp.layers
    function: Any = _function(mlp)

    def call(x: mx.array) -> mx.array:
        """The MLP's output, (..., width), as one function where it can be."""
        factors = [layer.lora_a for layer in layers] + [layer.lora_b for layer in layers]
        rows = [each.T for each in factors[:3]] + factors[3:]
        if any(map(draws, layers)) or not is_for_kernels(x, rows):
            result: mx.array = own(mlp.module, x)
            return result
        output: mx.array = function(x.reshape(-1, x.shape[-1]), *factors)[0]
        return output.reshape(*x.shape[:-1], -1)

    return call


def draws(layer: LoRALinear) -> bool:
    """Whether a layer's low-rank path sees dropout."""
    return bool(layer.dropout.training) and layer.dropout._p_1 < 1


def _function(mlp: GatedMLP) -> Any:
    """Down(silu(gate) up), and what the backward pass needs; x and outputs are (rows, width)."""
    gate, up, down = mlp.layers

    def sums(bases: Sequence[mx.array], z: mx.array, b: Sequence[mx.array]) -> list[LowRankSum]:
        rank = len(b[0])
        return list(map(LowRankSum, bases, (z[:rank], z[rank:]), b))

    @mx.custom_function
    def compute(x: mx.array, *factors: mx.array) -> list[mx.array]:
        """The output, both bases', all lora_a^T of gate and up, and z of both and of down."""
        (*a_in, a_down), (*b_in, b_down) = factors[:3], factors[3:]
        a = joined([each.T for each in a_in]).reshape(-1, x.shape[-1])
        z = narrow([(a, x)], gate.scale)
        bases = gate.linear(x), up.linear(x)
        inner = gated(*sums(bases, z, b_in))
        z_down = narrow([(a_down.T, inner)], down.scale)
        return [*with_low_rank([down], inner, [z_down], [b_down]), *bases, a, z, z_down]

    @compute.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        x, (*_, a_down), (*b_in, b_down) = primals[0], primals[1:4], primals[4:]
        g, (*bases, a, z, z_down) = cotangents[0], outputs[1:]
        dz_down = narrow([(b_down, g)], down.scale)
        d_inner = through_bases([down], bases[0], [g])
        of_gate, of_up = sums(bases, z, b_in)
        *d, inner = gated_back(of_gate, of_up, LowRankSum(d_inner, dz_down, a_down.T))
        dz = narrow(list(zip(b_in, d, strict=True)), gate.scale)
        dx = through([gate, up], x, d, dz, a)
        inward = (dz, x), (of_gate.z, d[0]), (of_up.z, d[1])
        da, db_gate, db_up, db_down, da_down = outer([*inward, (z_down, g), (dz_down, inner)])
        ranks = len(b_in[0])
        return dx, da[:ranks].T, da[ranks:].T, da_down.T, db_gate, db_up, db_down

    return compute
