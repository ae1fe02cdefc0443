"""Install the optimized layers and kernels in a model for the duration of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain

import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from nested_core import backend, seams
from nested_core.kernels.activation_checkpointing import checkpointing_layers
from nested_core.kernels.blocked_attention import using_blocked_attention
from nested_core.kernels.call_tracing import GatedMLP, group_layers_by_input, trace_calls
from nested_core.kernels.device_operations import device_operations, has_kernel_for_rank
from nested_core.kernels.geglu import using_recomputed_geglu
from nested_core.kernels.lora_linear import OPTIMIZED_CLASSES, using_optimized_lora_layers
from nested_core.kernels.quantized_linear import multiplying_by_dequantized_weights
from nested_core.kernels.swiglu import using_cpu_swiglu

OPTIMIZATION_CONTEXTS = (
    using_cpu_swiglu,
    using_recomputed_geglu,
    using_blocked_attention,
    multiplying_by_dequantized_weights,
)


@contextmanager
def using_optimized_layers(
    model: nn.Module, recomputed: Sequence[nn.Module] = (), *, as_mlx_lm: bool = False
) -> Iterator[None]:
    """Compute a model with our layers and kernels during the block.

    recomputed: the layers under gradient checkpointing, whose activations are computed again in the
        backward pass.
    as_mlx_lm: use mlx-lm's own computation for everything else.
    """
    with checkpointing_layers(recomputed, keep_dropout_masks=not as_mlx_lm):
        if as_mlx_lm:
            yield
            return
        operations = device_operations()
        mlps, groups = _find_mlps_and_shared_inputs(model)
        with ExitStack() as stack:
            of_rooms = seams.load_all("layer_context")  # what optional parts of the program add
            for optimization in (*operations.layer_contexts, *OPTIMIZATION_CONTEXTS, *of_rooms):
                stack.enter_context(optimization(model))
            stack.enter_context(using_optimized_lora_layers(model, groups))
            stack.enter_context(operations.using_fused_mlps(mlps))
            yield


def describe_layers(model: nn.Module, *, as_mlx_lm: bool = False) -> str:
    """Say in one line how many adapter layers use our code and kernels, and why others do not.

    model: with mlx-lm's layers, which `using_optimized_layers` has not replaced.
    as_mlx_lm: whether the configuration asks for mlx-lm's own layers.
    """
    if as_mlx_lm:
        return "layers: mlx-lm's own, as training.reference asks"
    adapters = [module for _, module in model.named_modules() if "lora_a" in module]
    ours = [module for module in adapters if type(module) in OPTIMIZED_CLASSES]
    # Layers of mixtures of experts, which the device's own code replaces
    experts = set(map(id, device_operations().find_expert_layers(model)))
    others = [m for m in adapters if type(m) not in OPTIMIZED_CLASSES and id(m) not in experts]
    count = len(adapters) - len(others)
    parts = [f"{count} of {len(adapters)} with an adapter use nested-tune's code"]
    if others:
        parts.append(f"{', '.join(sorted({type(m).__name__ for m in others}))} is mlx-lm's")
    if not backend.computes_on_cuda():
        where = "a CPU" if backend.device() == "cpu" else "Metal, on which they were never run"
        return f"layers: {'; '.join(parts)}; no CUDA kernels on {where}"
    if not seams.is_there("cuda"):
        return f"layers: {'; '.join(parts)}; no CUDA kernels without nested_core/rooms/cuda"
    mlps, _ = _find_mlps_and_shared_inputs(model)
    parts.append(f"{len(mlps)} gated MLPs are one function each")
    ranks = sorted({module.lora_b.shape[0] for module in ours})
    without = [str(rank) for rank in ranks if not has_kernel_for_rank(rank)]
    if without:
        parts.append(f"no kernel takes rank {', '.join(without)} (multiples of 8, up to 64)")
    return f"layers: {'; '.join(parts)}"


def _find_mlps_and_shared_inputs(model: nn.Module) -> tuple[list[GatedMLP], list[list[LoRALinear]]]:
    """Find MLPs to be fused, and groups of LoRA layers that share an input.

    The trace is not kept, since it keeps the model's present arrays alive.
    """
    trace = trace_calls(model)
    mlps = device_operations().find_fusable_mlps(trace)
    groups = group_layers_by_input(trace, exclude=chain(*(mlp.layers for mlp in mlps)))
    for mlp in mlps:  # for inputs that do not fit the fused function
        if mlp.gate_proj_matches_up_proj():
            groups.append(list(mlp.layers[:2]))
    return mlps, groups
