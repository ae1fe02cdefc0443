"""Compute a model with layers that are faster than mlx-lm's, for the duration of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import mlx.nn as nn

from nested_core import seams
from nested_core.kernels.activation_checkpointing import checkpointing_layers
from nested_core.kernels.device_operations import device_operations
from nested_core.kernels.quantized_linear import multiplying_by_dequantized_weights


@contextmanager
def using_optimized_layers(
    model: nn.Module, recomputed: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Compute a model with our layers for this device during the block; others are mlx-lm's.

    recomputed: the layers under gradient checkpointing, whose activations are computed again in the
        backward pass.
    """
    with ExitStack() as stack:
        stack.enter_context(checkpointing_layers(recomputed))
        stack.enter_context(device_operations().using_layers(model))
        stack.enter_context(multiplying_by_dequantized_weights(model))
        for using_layers_of_room in seams.load_all("layer_context"):
            stack.enter_context(using_layers_of_room(model))
        yield
