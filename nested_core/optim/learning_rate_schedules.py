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
    """Build the optimizer's learning rate from the configuration.

    steps: optimizer steps of the run, for warm-up shares and decay.
    share: a factor on the whole rate.

    Returns a number, or a schedule that is called with the optimizer step, from 0.
    """
    rate: float | Schedule = config.learning_rate
    if config.lr_schedule is not None:
        from mlx_lm.tuner.utils import build_schedule

        section = config.lr_schedule.model_dump()
        rate = build_schedule(section | {"arguments": list(section["arguments"])})
    warmup = count_warmup_steps(config, steps)
    if config.training.decay is not None:
        rate = cosine(config.learning_rate, warmup, steps)
    rate = add_warmup(rate, warmup) if warmup else rate
    if share == 1:
        return rate
    return (lambda step: share * rate(step)) if callable(rate) else share * rate


def count_warmup_steps(config: FineTuneConfig, steps: int) -> int:
    """Return `training.warmup_steps` as a number; a share is of the run's optimizer `steps`."""
    warmup = config.training.warmup_steps
    return max(1, int(warmup * steps)) if 0 < warmup < 1 else int(warmup)


def cosine(rate: float, first: int, last: int) -> Schedule:
    """Return a schedule that falls from `rate` at step `first` to a share of it at step `last`.

    The share is LOWEST_SHARE. Steps count from 1; the rate is constant before and after (SGDR,
    arXiv 1608.03983, equation 5, without restarts). Like every mlx schedule it is called with n - 1
    for step n.
    """

    def decayed(step: mx.array) -> mx.array:
        """Return the rate at optimizer step `step` + 1."""
        passed = ((step + 1).astype(mx.float32) - first) / max(1, last - first)
        falling = 0.5 * (1 + mx.cos(math.pi * mx.clip(passed, 0.0, 1.0)))
        return rate * (LOWEST_SHARE + (1 - LOWEST_SHARE) * falling)

    return decayed


def add_warmup(rate: float | Schedule, steps: int) -> Schedule:
    """Return a schedule that multiplies `rate` by min(1, n / steps) at optimizer step n, from 1."""

    def warmed(step: mx.array) -> mx.array:
        """Return the rate at optimizer step `step` + 1."""
        base = rate(step) if callable(rate) else mx.array(rate)
        return base * mx.minimum(1.0, (step + 1).astype(mx.float32) / steps)

    return warmed
