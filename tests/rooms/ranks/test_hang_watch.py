"""How long a rank may take for a step before its alarm ends it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from nested_core.rooms.ranks.rank_world import REMEMBERED_STEPS, HangWatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass; alarms are not set, for they would end this process."""
    now = [0.0]

    def let_pass(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signal, "setitimer", lambda which, seconds: None)
    return let_pass


def test_the_bound_follows_from_the_longest_of_the_last_steps_and_is_a_minute_at_least(
    clock: Callable[[float], None],
) -> None:
    watch = HangWatch("auto")
    for seconds in (0.1, 2.0):
        clock(seconds)
        watch.after_step()
    assert watch.seconds_allowed() == 60
    clock(9.0)
    watch.after_step()
    assert watch.seconds_allowed() == 90
    for _ in range(REMEMBERED_STEPS):
        watch.after_step()
    assert watch.seconds_allowed() == 60


def test_what_is_no_plain_step_may_take_ten_times_longer_and_counts_for_no_bound(clock) -> None:
    watch = HangWatch("auto")
    watch.allow_longer()
    assert watch.seconds_allowed() == 600
    for allowed in (600, 60):  # its result is waited for in the step after it
        clock(500)
        watch.after_step()
        assert watch.seconds_allowed() == allowed


def test_seconds_that_are_given_are_the_bound(clock: Callable[[float], None]) -> None:
    watch = HangWatch(30.0)
    clock(29)
    watch.after_step()
    assert watch.seconds_allowed() == 30


def test_the_alarm_is_set_anew_at_each_step_and_off_at_the_end(clock, monkeypatch) -> None:
    alarms: list[float] = []
    monkeypatch.setattr(signal, "setitimer", lambda which, seconds: alarms.append(seconds))
    for timeout in ("auto", None):
        watch = HangWatch(timeout)
        watch.after_step()
        watch.end()
    assert alarms == [60, 0]
