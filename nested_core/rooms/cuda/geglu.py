"""Gemma's gated MLPs on CUDA, with gelu(gate) * up recomputed in the backward pass.

MLX stores three more arrays of the MLP's inner width for it; here only gate and up are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma2, gemma3_text

from nested_core import backend
from nested_core.kernels.patching import replacing_calls

GEGLU_MLP_CLASSES = gemma2.MLP, gemma3_text.MLP


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """Compute gelu(gate) * up, as Gemma models do."""
    return cast(mx.array, nn.gelu_approx(gate) * up)


recomputed_geglu: Any = mx.checkpoint(geglu)


def make_geglu_mlp_call(mlp: Any) -> Callable[[mx.array], mx.array]:
    """Return a replacement for the MLP's __call__, (..., width) to (..., width)."""

    def call(x: mx.array) -> mx.array:
        """Compute down(gelu(gate(x)) * up(x)), recomputing the product in the backward pass."""
        product = recomputed_geglu(mlp.gate_proj(x), mlp.up_proj(x))
        return cast(mx.array, mlp.down_proj(product))

    return call


def using_recomputed_geglu(model: nn.Module) -> AbstractContextManager[None]:
    """Recompute a model's gelu(gate) * up in the backward pass, on CUDA, in the block.

    On a CPU, recomputing tanh would take more time than the memory is worth.
    """
    mlps = [m for _, m in model.named_modules() if type(m) in GEGLU_MLP_CLASSES]
    if not backend.computes_on_cuda():
        mlps = []
    return replacing_calls((mlp, make_geglu_mlp_call(mlp)) for mlp in mlps)
