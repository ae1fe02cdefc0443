"""The memory that a run may take, and how many layers it recomputes; the room memory forecasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core import backend, seams
from nested_core.training.training_setup import TrainingSetup


@dataclass(frozen=True)
class MemoryPlan:
    """The memory there is, in bytes, and of `layers` layers the number that is recomputed.

    needed: the predicted peak, in bytes; None without the room that predicts one.
    forecast: both in words, on one line; empty without a prediction.
    """

    needed: int | None
    capacity: int
    recomputed: int
    layers: int
    forecast: str = ""

    @property
    def fits(self) -> bool:
        """Whether no peak beyond the capacity is predicted."""
        return self.needed is None or self.needed <= self.capacity

    def describe(self) -> str:
        """The predicted peak, the capacity, and the settings that would fit, on one line."""
        return self.forecast or f"memory: {self.capacity / 1e9:.1f} GB"

    def layers_to_recompute(self, model: nn.Module) -> Sequence[nn.Module]:
        """The layers to recompute: the lowest that train.

        Their turn comes last in the backward pass, when what the others kept is free again.
        """
        layers: Any = model.layers
        if self.recomputed in (0, self.layers):
            return layers if self.recomputed else ()
        first = len(layers) - self.layers
        chosen: Sequence[nn.Module] = layers[first : first + self.recomputed]
        return chosen


def plan_memory(setup: TrainingSetup) -> MemoryPlan:
    """The plan of a run on the default device, within its memory or `memory_limit_gb`.

    Bounds the freed buffers that MLX keeps in this process to `clear_cache_threshold`, if set.
    """
    config = setup.config
    if config.clear_cache_threshold:
        mx.set_cache_limit(config.clear_cache_threshold)
    limit = config.training.memory_limit_gb
    capacity = backend.device_memory_bytes() if limit is None else int(limit * 1e9)
    for forecast_memory in seams.load_all("memory_forecast"):
        plan: MemoryPlan = forecast_memory(setup, capacity)
        return plan
    layers = len(setup.model.layers)
    return MemoryPlan(None, capacity, layers if config.grad_checkpoint else 0, layers)
