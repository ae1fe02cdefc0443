"""The arithmetic of a run's row: its clock, where it crosses a loss, and ratios over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def losses_of(row: Row) -> list[float]:
    """The validation losses, before the first step and after each window; null is infinite."""
    return [math.inf if loss is None else loss for loss in row["losses"]]


def elapsed(row: Row) -> list[float]:
    """Seconds of training up to each loss, beginning with 0.

    Steps are traced and compiled in the first window: it counts as the median of the others.
    """
    windows = row["windows"]
    steady = [statistics.median(windows[1:]), *windows[1:]]
    return [0.0, *(sum(steady[:n]) for n in range(1, len(steady) + 1))]


def crossing(places: Sequence[float], losses: Sequence[float], target: float) -> float:
    """Where the loss first is at most the target, on straight lines between the points.

    Infinite where it never is. `places` are steps or seconds.
    """
    if losses[0] <= target:
        return places[0]
    for i in range(1, len(losses)):
        before, after = losses[i - 1], losses[i]
        if after <= target:
            share = 1.0 if math.isinf(before) else (before - target) / (before - after)
            return places[i - 1] + share * (places[i] - places[i - 1])
    return math.inf


def loss_at(row: Row, step: int) -> float:
    """The validation loss after a step at which there was a look."""
    steps: list[int] = row["steps"]
    return losses_of(row)[steps.index(step)]


def to_target(row: Row, target: float) -> tuple[float, float]:
    """Steps and seconds to a loss."""
    losses = losses_of(row)
    return crossing(row["steps"], losses, target), crossing(elapsed(row), losses, target)


def middle(values: Sequence[float]) -> float:
    """The median, in which what was never reached counts as infinite."""
    ordered = sorted(values)
    half = len(ordered) // 2
    if len(ordered) % 2 or math.isinf(ordered[half]):
        return ordered[half]
    return (ordered[half - 1] + ordered[half]) / 2
