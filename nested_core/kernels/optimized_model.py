"""Compute a model with layers that are faster than mlx-lm's, for the duration of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import mlx.nn as nn

from nested_core import seams
from nested_core.kernels.activation_checkpointing import checkpointing_layers
from nested_core.kernels.device_operations import device_operations
from nested_core.kernels.quantized_linear import multiplying_by_dequantized_weights


@dataclass(frozen=True)
class ModelLayers:
    """A room's layers in place of a model's, on every device.

    using: returns a context in which the model computes with them.
    """

    using: Callable[[nn.Module], AbstractContextManager[None]]


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
        for layers in seams.load_all(ModelLayers):
            stack.enter_context(layers.using(model))
        yield
