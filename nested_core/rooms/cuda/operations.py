"""The kernels of this room as the core's layers ask for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager

import mlx.core as mx
import mlx.nn as nn

from nested_core.kernels.call_tracing import CallTrace, GatedMLP
from nested_core.kernels.device_operations import (
    DeviceOperations,
    LayerContext,
    Pairs,
)
from nested_core.rooms.cuda import expert_mlps, fused_mlp, lora_add, lora_matmuls
from nested_core.rooms.cuda.concatenate import concatenate_flattened
from nested_core.rooms.cuda.lora_add import LowRankSumTerms
from nested_core.rooms.cuda.padded_attention import using_padded_attention
from nested_core.rooms.cuda.rms_norm import using_frozen_norms
from nested_core.rooms.cuda.rope import using_rope_tables
from nested_core.rooms.cuda.swiglu import using_swiglu_kernels


class CUDAOperations(DeviceOperations):
    """Kernels for arrays that fit them, where they agree with MLX; else MLX's operations."""

    layer_contexts: Sequence[LayerContext] = (
        using_swiglu_kernels,
        using_padded_attention,
        using_rope_tables,
        using_frozen_norms,
        expert_mlps.using_expert_mlps,
    )

    def concatenate_flattened(self, arrays: Sequence[mx.array]) -> mx.array:
        """By one kernel for up to 32 arrays."""
        return concatenate_flattened(arrays)

    def project_to_rank(self, pairs: Pairs, scale: float) -> mx.array:
        """By one kernel for up to four pairs."""
        return lora_matmuls.project_to_rank(pairs, scale)

    def factor_gradients(self, pairs: Pairs) -> Sequence[mx.array]:
        """By one kernel and a sum for up to four pairs of one rank."""
        return lora_matmuls.factor_gradients(pairs)

    def can_add_low_rank_products(self, x: mx.array, factors: Sequence[mx.array]) -> bool:
        """Whether the arrays are of a dtype and of sizes that the kernels take."""
        return lora_add.can_use_lora_kernels(x, factors)

    def add_low_rank_products(
        self, bases: Sequence[mx.array], z: Sequence[mx.array], factors: Sequence[mx.array]
    ) -> Sequence[mx.array]:
        """By one kernel for up to four sums."""
        return lora_add.compute_low_rank_sums(list(map(LowRankSumTerms, bases, z, factors)))

    def check_kernels(self, ranks: Collection[int]) -> None:
        """Compile and check the kernels for layers of these ranks."""
        lora_matmuls.check_lora_kernels(ranks)

    def invert_unit_lower(self, a: mx.array) -> mx.array | None:
        """For float32 matrices as large as a chunk on a GPU."""
        from nested_core.rooms.cuda import gated_delta_kernels  # of the room delta_nets

        return gated_delta_kernels.invert_unit_lower(a)

    def carry_states(
        self,
        decay: mx.array,
        erased: mx.array,
        written: mx.array,
        state: mx.array,
        direction: int,
    ) -> list[mx.array] | None:
        """For bfloat16 chunks and a float32 state of sizes that fit."""
        from nested_core.rooms.cuda import gated_delta_kernels

        return gated_delta_kernels.carry_states(decay, erased, written, state, direction)

    def find_expert_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The layers with LoRA on experts whose factors are multiplied all at once."""
        return expert_mlps.find_expert_layers(model)

    def find_fusable_mlps(self, trace: CallTrace) -> list[GatedMLP]:
        """The gated MLPs of LoRA layers whose ranks have kernels."""
        return fused_mlp.find_fusable_mlps(trace)

    def using_fused_mlps(self, mlps: Sequence[GatedMLP]) -> AbstractContextManager[None]:
        """Compute these modules as one function each within the block."""
        return fused_mlp.using_fused_mlps(mlps)


CUDA_OPERATIONS = CUDAOperations()
