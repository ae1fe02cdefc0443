"""The memory that a run may use, and the layers it recomputes; room memory predicts the peak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from nested_core import backend, seams
from nested_core.training.training_setup import TrainingSetup


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a run may use and is expected to need, in bytes.

    needed: the predicted peak; None without the room that predicts it.
    recomputed: how many of the model's `layers` recompute activations in the backward pass.
    forecast: prediction and capacity in words, on one line; empty without a prediction.
    """

    needed: int | None
    capacity: int
    recomputed: int
    layers: int
    forecast: str = ""

    @property
    def fits(self) -> bool:
        """Whether the predicted peak, if there is a prediction, is within the capacity."""
        return self.needed is None or self.needed <= self.capacity

    def describe(self) -> str:
        """Describe the predicted peak, the capacity, and settings that would fit, on one line."""
        return self.forecast or f"memory: {self.capacity / 1e9:.1f} GB"

    def layers_to_recompute(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return the layers to recompute: the lowest of those that train.

        The backward pass reaches them last, when the activations of the other layers are already
        freed.
        """
        layers: Sequence[nn.Module] = model.layers
        if self.recomputed in (0, self.layers):
            return layers if self.recomputed else ()
        first = len(layers) - self.layers
        return layers[first : first + self.recomputed]


@dataclass(frozen=True)
class MemoryForecaster:
    """A room's prediction of a run's memory.

    plan: plans a run on the default device, of which it may take a number of bytes.
    """

    plan: Callable[[TrainingSetup, int], MemoryPlan]


def plan_memory(setup: TrainingSetup) -> MemoryPlan:
    """Plan a run on the default device, within its memory or `memory_limit_gb`.

    Also limits the freed buffers that MLX keeps in this process to `clear_cache_threshold`, if set.
    """
    config = setup.config
    if config.clear_cache_threshold:
        mx.set_cache_limit(config.clear_cache_threshold)
    limit = config.training.memory_limit_gb
    capacity = backend.device_memory_bytes() if limit is None else int(limit * 1e9)
    for forecast in seams.load_all(MemoryForecaster):  # one at most
        return forecast.plan(setup, capacity)
    layers = len(setup.model.layers)
    return MemoryPlan(None, capacity, layers if config.grad_checkpoint else 0, layers)
