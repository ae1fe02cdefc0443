"""How a model is computed while it trains or is evaluated: everything that is swapped, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain

import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from nested_core.kernels.activation_checkpointing import recomputed
from nested_core.kernels.attention import blocked_attention
from nested_core.kernels.fused_mlp import fusable_mlps, fused_mlps
from nested_core.kernels.lora_linear import low_rank
from nested_core.kernels.quantized_linear import whole_weights
from nested_core.kernels.rms_norm import frozen_norms
from nested_core.kernels.rope import tabled_rope
from nested_core.kernels.swiglu import fused_swiglu
from nested_core.kernels.tracing import GatedMLP, shared_inputs, watched

SWAPPED = fused_swiglu, blocked_attention, tabled_rope, frozen_norms, whole_weights


@contextmanager
def prepared(
    model: nn.Module, recomputes: Sequence[nn.Module] = (), *, as_mlx_lm: bool = False
) -> Iterator[None]:
    """Have a model computed our way while the block runs.

    `recomputes` are the layers under gradient checkpointing; `as_mlx_lm` leaves everything else to
    mlx-lm.
    """
    with recomputed(recomputes):
        if as_mlx_lm:
            yield
            return
        mlps, groups = _found_in(model)
        with ExitStack() as stack:
            for swapped in SWAPPED:
                stack.enter_context(swapped(model))
            stack.enter_context(low_rank(model, groups))
            stack.enter_context(fused_mlps(mlps))
            yield


def _found_in(model: nn.Module) -> tuple[list[GatedMLP], list[list[LoRALinear]]]:
    """The MLPs that are one function each, and the layers that share an input.

    Nothing of what was watched is kept: it holds on to the arrays that the model has now.
    """
    calls = watched(model)
    mlps = fusable_mlps(calls)
    groups = shared_inputs(calls, apart=chain(*(mlp.layers for mlp in mlps)))
    groups += [list(mlp.layers[:2]) for mlp in mlps if mlp.is_even()]  # for what does not fit
    return mlps, groups
