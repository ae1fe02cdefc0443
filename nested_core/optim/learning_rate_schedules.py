"""The learning rate of a run: a number or mlx-lm's lr_schedule, with warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from nested_core.config.schema import FineTuneConfig


Schedule = Callable[[mx.array], mx.array]
LOWEST_SHARE = 0.1  # of the learning rate, where a cosine ends


def build_learning_rate(config: FineTuneConfig, steps: int, share: float = 1.0) -> float | Schedule:
    """The optimizer's learning rate in a run of `steps` optimizer steps, times `share`.

    A schedule is read on optimizer steps, from 0.
    """
    rate: float | Schedule = config.learning_rate
    if config.lr_schedule is not None:
        from mlx_lm.tuner.utils import build_schedule

        section = config.lr_schedule.model_dump()
        rate = build_schedule(section | {"arguments": list(section["arguments"])})
    training = config.training
    warmup = training.warmup_steps
    if 0 < warmup < 1:
        warmup = max(1, int(warmup * steps))
    if training.decay is not None:
        rate = cosine(config.learning_rate, int(warmup), steps)
    rate = add_warmup(rate, int(warmup)) if warmup else rate
    return rate if share == 1 else _multiply(rate, share)


def _multiply(rate: float | Schedule, share: float) -> float | Schedule:
    return (lambda step: share * rate(step)) if callable(rate) else share * rate


def cosine(rate: float, first: int, last: int) -> Schedule:
    """A rate that falls from step `first` to LOWEST_SHARE of it at step `last`, both from 1.

    Before and after it stays (SGDR, arXiv 1608.03983, equation 5, without restarts); it is given
    n - 1 for step n, as every schedule of mlx.
    """

    def decayed(step: mx.array) -> mx.array:
        passed = ((step + 1).astype(mx.float32) - first) / max(1, last - first)
        falling = 0.5 * (1 + mx.cos(math.pi * mx.clip(passed, 0.0, 1.0)))
        return rate * (LOWEST_SHARE + (1 - LOWEST_SHARE) * falling)

    return decayed


def add_warmup(rate: float | Schedule, steps: int) -> Schedule:
    """rate * min(1, n / steps) at optimizer step n = 1, 2, ...; a schedule is given n - 1."""

    def warmed(step: mx.array) -> mx.array:
        base = rate(step) if callable(rate) else mx.array(rate)
        return base * mx.minimum(1.0, (step + 1).astype(mx.float32) / steps)

    return warmed
