"""The layers and kernels of this room as the core asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from nested_core.kernels.device_operations import DeviceOperations, has_kernel_for_rank
from nested_core.rooms.cuda.call_tracing import GatedMLP, group_layers_by_input, trace_calls
from nested_core.rooms.cuda.concatenate import concatenate_flattened
from nested_core.rooms.cuda.expert_mlps import find_expert_layers, using_expert_mlps
from nested_core.rooms.cuda.fused_mlp import find_fusable_mlps, using_fused_mlps
from nested_core.rooms.cuda.geglu import using_recomputed_geglu
from nested_core.rooms.cuda.lora_linear import OUR_CLASSES, using_optimized_lora_layers
from nested_core.rooms.cuda.padded_attention import using_padded_attention
from nested_core.rooms.cuda.rms_norm import using_frozen_norms
from nested_core.rooms.cuda.rope import using_rope_tables
from nested_core.rooms.cuda.swiglu import using_swiglu_kernels

LAYER_CONTEXTS = (
    using_swiglu_kernels,
    using_padded_attention,
    using_rope_tables,
    using_frozen_norms,
    using_expert_mlps,
    using_recomputed_geglu,
)


class CUDAOperations(DeviceOperations):
    """Kernels for arrays that fit them, where they agree with MLX; else MLX's operations."""

    @contextmanager
    def using_layers(self, model: nn.Module) -> Iterator[None]:
        """Compute a model with this room's layers during the block."""
        mlps, groups = find_mlps_and_shared_inputs(model)
        with ExitStack() as stack:
            for using_layers in LAYER_CONTEXTS:
                stack.enter_context(using_layers(model))
            stack.enter_context(using_optimized_lora_layers(model, groups))
            stack.enter_context(using_fused_mlps(mlps))
            yield

    def describe_layers(self, model: nn.Module) -> str:
        """Say how many adapter layers use this room's code and kernels, and why others do not.

        model: with mlx-lm's layers, which `using_layers` has not replaced.
        """
        adapters = [module for _, module in model.named_modules() if "lora_a" in module]
        ours = [module for module in adapters if type(module) in OUR_CLASSES]
        experts = set(map(id, find_expert_layers(model)))
        others = [m for m in adapters if type(m) not in OUR_CLASSES and id(m) not in experts]
        count = len(adapters) - len(others)
        parts = [f"{count} of {len(adapters)} with an adapter use nested-tune's code"]
        if others:
            parts.append(f"{', '.join(sorted({type(m).__name__ for m in others}))} is mlx-lm's")
        mlps, _ = find_mlps_and_shared_inputs(model)
        parts.append(f"{len(mlps)} gated MLPs are one function each")
        ranks = sorted({module.lora_b.shape[0] for module in ours})
        without = [str(rank) for rank in ranks if not has_kernel_for_rank(rank)]
        if without:
            parts.append(f"no kernel takes rank {', '.join(without)} (multiples of 8, up to 64)")
        return f"layers: {'; '.join(parts)}"

    def concatenate_flattened(self, arrays: Sequence[mx.array]) -> mx.array:
        """Concatenate by one kernel for up to 32 arrays."""
        return concatenate_flattened(arrays)

    def invert_unit_lower(self, a: mx.array) -> mx.array | None:
        """Invert float32 matrices as large as a chunk on a GPU."""
        from nested_core.rooms.cuda import gated_delta_kernels  # of the room delta_nets

        return gated_delta_kernels.invert_unit_lower(a)

    def carry_states(
        self, decay: mx.array, erased: mx.array, written: mx.array, state: mx.array, direction: int
    ) -> list[mx.array] | None:
        """Carry a float32 state through bfloat16 chunks of sizes that fit."""
        from nested_core.rooms.cuda import gated_delta_kernels

        return gated_delta_kernels.carry_states(decay, erased, written, state, direction)


def find_mlps_and_shared_inputs(model: nn.Module) -> tuple[list[GatedMLP], list[list[LoRALinear]]]:
    """Find MLPs to be fused, and groups of LoRA layers that share an input.

    The trace is not kept, since it keeps the model's present arrays alive.
    """
    trace = trace_calls(model)
    mlps = find_fusable_mlps(trace)
    groups = group_layers_by_input(trace, exclude=chain(*(mlp.layers for mlp in mlps)))
    for mlp in mlps:  # for inputs that do not fit the fused function
        if mlp.gate_proj_matches_up_proj():
            groups.append(list(mlp.layers[:2]))
    return mlps, groups


CUDA_OPERATIONS = CUDAOperations()
