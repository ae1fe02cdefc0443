"""Turns at work that one thread does at a time: smaller work overtakes larger work."""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager

SIZE_PER_SECOND = 8 * 1024  # bytes or characters; work of 80 KiB lets smaller work pass for 10 s
OLDEST_AFTER = 30.0  # seconds after which the oldest that waits has half of the time
Place = tuple[float, float, int]  # of work that waits; the number is its own


class Turns:
    """Lets one thread work at a time: the smallest work that waits is the next.

    Once the oldest has waited for OLDEST_AFTER, it and what came after it take every second turn by
    age, so that small work without end keeps no larger one waiting.
    """

    def __init__(self, share: float = 1.0) -> None:
        """Let the work take this share of the time at most; after each turn there is a pause."""
        self._share = share
        self._changed = threading.Lock()
        # When work is due and when it came, by time.monotonic(); the next stands first
        self._by_due: list[Place] = []
        # What wakes its thread, and not all that wait
        self._by_arrival: dict[Place, threading.Event] = {}
        self._is_taken = False
        self._next = self._next_oldest = 0.0  # when they may begin, by time.monotonic()

    @contextmanager
    def taking(self, size: int) -> Iterator[None]:
        """Do the block in a turn of its own, by the size of its work."""
        event, now, began = threading.Event(), time.monotonic(), None
        own = now + size / SIZE_PER_SECOND, now, id(event)
        try:
            with self._changed:
                insort(self._by_due, own)
                self._by_arrival[own] = event
            while began is None:
                with self._changed:
                    event.clear()
                    if (wait := self._find_wait(own)) == 0:
                        self._is_taken, began = True, time.monotonic()
                if began is None:
                    event.wait(wait)
            yield
        finally:
            with self._changed:
                if began is not None:
                    self._is_taken = False
                    seconds = (time.monotonic() - began) / self._share
                    self._next = began + seconds
                    if next(iter(self._by_arrival)) == own:
                        self._next_oldest = began + 2 * seconds
                self._by_due.remove(own)
                del self._by_arrival[own]
                if self._by_arrival:
                    self._by_arrival[self._find_next()].set()

    def _find_next(self) -> Place:
        """Return the work that is the next to begin."""
        oldest = next(iter(self._by_arrival))
        by = max(self._next_oldest, oldest[1] + OLDEST_AFTER)
        return oldest if by <= self._next else self._by_due[0]

    def _find_wait(self, own: Place) -> float | None:
        """Return the seconds until it may begin; None until other work comes or has been done."""
        is_next = own == self._find_next() and not self._is_taken
        return max(0.0, self._next - time.monotonic()) if is_next else None
