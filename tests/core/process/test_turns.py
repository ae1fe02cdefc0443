"""Smaller work overtakes larger work, and both get their turn."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import pytest

from nested_core.process import turns
from nested_core.process.turns import SIZE_PER_SECOND, Turns
from tests.waiting import wait_until


def do_after_a_first_one(work: Turns, sizes: tuple[int, ...]) -> list[int]:
    """Wait with work of these sizes, in 100 seconds, while other work is done; the order."""
    done: list[int] = []

    def do(size: int) -> None:
        with work.taking(size * 100 * SIZE_PER_SECOND):
            time.sleep(0.002)
            done.append(size)

    with ThreadPoolExecutor() as pool:
        waiting: list[Future[None]] = []
        work._is_taken = True
        for size in sizes:
            waiting.append(pool.submit(do, size))
            wait_until(lambda: len(work._by_due) == len(waiting), "it waits")
        with work._changed:
            work._is_taken, work._next = False, time.monotonic()
            work._by_arrival[work._find_next()].set()
        for one in waiting:
            one.result()
    assert (work._by_due, work._by_arrival) == ([], {})
    return done


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_of_work_that_waits_the_smallest_is_done_next(share: float) -> None:
    assert do_after_a_first_one(Turns(share), (5, 4, 2, 3)) == [2, 3, 4, 5]


def test_small_work_without_end_does_not_keep_larger_work_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two threads do the smallest in a loop; one of them always waits."""
    monkeypatch.setattr(turns, "OLDEST_AFTER", 0.3)
    is_over, work = threading.Event(), Turns()

    def do_without_end() -> None:
        while not is_over.is_set():
            with work.taking(1):
                time.sleep(0.002)

    with ThreadPoolExecutor() as pool:
        pool.submit(do_without_end)
        pool.submit(do_without_end)
        try:
            with work.taking(1000 * SIZE_PER_SECOND):
                pass
        finally:
            is_over.set()


def test_work_that_has_waited_leaves_half_of_the_time_to_smaller_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "OLDEST_AFTER", 0.0)
    assert do_after_a_first_one(Turns(), (9, 9, 9, 2, 2, 2))[:2] == [9, 2]


def test_work_that_fails_leaves_the_turn_to_others() -> None:
    work = Turns()
    with suppress(ValueError), work.taking(1):
        raise ValueError
    with work.taking(1):
        pass
    assert work._by_due == []
