"""The totals between two reports: tokens/s counts training alone."""

from __future__ import annotations

import mlx.core as mx
import pytest

from nested_core.training.due_parts import MetricsWindow
from nested_core.training.world import Sums, World


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("nested_core.training.due_parts.time.perf_counter", clock)
    return clock


def micro_batch(tokens: int) -> dict[str, mx.array]:
    return {"loss": mx.array(1.0), "weight": mx.array(tokens), "tokens": mx.array(tokens)}


def test_a_report_that_waits_for_the_device_does_not_shorten_the_next_one(clock: Clock) -> None:
    class SlowWorld(World):
        """Sums that are ready 0.2 s after they are asked for."""

        def sum_scalars_over_ranks(self, sums: Sums) -> Sums:
            clock.seconds += 0.2
            return sums

    window = MetricsWindow(SlowWorld())
    rates = []
    for _ in range(3):
        window.add_micro_batch(micro_batch(tokens=10))
        clock.seconds += 0.8
        with window.pausing_clock():
            rates.append(window.close_and_report()["tokens_per_second"])
    assert rates == pytest.approx([10.0, 10.0, 10.0])


def test_pauses_before_and_after_a_report_are_not_training(clock: Clock) -> None:
    window = MetricsWindow(World())
    rates = []
    for _ in range(2):
        window.add_micro_batch(micro_batch(tokens=10))
        clock.seconds += 1.0
        with window.pausing_clock():  # an evaluation
            clock.seconds += 5.0
        with window.pausing_clock():  # a report, and then a checkpoint
            rates.append(window.close_and_report()["tokens_per_second"])
            clock.seconds += 3.0
    assert rates == pytest.approx([10.0, 10.0])
