"""The learning rate of a run: a number or mlx-lm's lr_schedule, with an optional linear warm-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from nested_core.config.schema import FineTuneConfig


Schedule = Callable[[mx.array], mx.array]


def build_learning_rate(config: FineTuneConfig) -> float | Schedule:
    """The optimizer's learning rate; a schedule is read on optimizer steps, from 0."""
    rate: float | Schedule = config.learning_rate
    if config.lr_schedule is not None:
        from mlx_lm.tuner.utils import build_schedule

        section = config.lr_schedule.model_dump()
        rate = build_schedule(section | {"arguments": list(section["arguments"])})
    warmup = config.training.warmup_steps
    return add_warmup(rate, warmup) if warmup else rate


def add_warmup(rate: float | Schedule, steps: int) -> Schedule:
    """rate * min(1, n / steps) at optimizer step n = 1, 2, ...; a schedule is given n - 1."""

    def warmed(step: mx.array) -> mx.array:
        base = rate(step) if callable(rate) else mx.array(rate)
        return base * mx.minimum(1.0, (step + 1).astype(mx.float32) / steps)

    return warmed
