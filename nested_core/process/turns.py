"""Turns at work that one thread does at a time: smaller work overtakes larger work."""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager

SIZE_PER_SECOND = 8 * 1024  # bytes or characters; work of 80 KiB lets smaller work pass for 10 s
OLDEST_AFTER = 30.0  # seconds after which the oldest that waits has half of the time


class Turns:
    """Lets one thread work at a time: the smallest work that waits is the next.

    Once the oldest has waited for OLDEST_AFTER, it and what came after it take every second turn by
    age, so that small work without end keeps no larger one waiting.
    """

    def __init__(self, share: float = 1.0) -> None:
        """Let the work take this share of the time at most; after each turn there is a pause."""
        self._share = share
        self._changed = threading.Condition()
        # When work is due and when it came, by time.monotonic(); the next stands first
        self._by_due: list[tuple[float, float]] = []
        self._by_arrival: list[tuple[float, float]] = []
        self._is_taken = False
        self._next = self._next_oldest = 0.0  # when they may begin, by time.monotonic()

    @contextmanager
    def taking(self, size: int) -> Iterator[None]:
        """Do the block in a turn of its own, by the size of its work."""
        own = (now := time.monotonic()) + size / SIZE_PER_SECOND, now
        began = None
        try:
            with self._changed:
                insort(self._by_due, own)
                self._by_arrival.append(own)
                while (wait := self._find_wait(own)) != 0:
                    self._changed.wait(wait)
                self._is_taken, began = True, time.monotonic()
            yield
        finally:
            with self._changed:
                if began is not None:
                    self._is_taken = False
                    seconds = (time.monotonic() - began) / self._share
                    self._next = began + seconds
                    if self._by_arrival[0] == own:
                        self._next_oldest = began + 2 * seconds
                self._by_due.remove(own)
                self._by_arrival.remove(own)
                self._changed.notify_all()

    def _find_wait(self, own: tuple[float, float]) -> float | None:
        """Return the seconds until it may begin; None until other work comes or has been done."""
        by = max(self._next_oldest, self._by_arrival[0][1] + OLDEST_AFTER)
        is_next = own == (self._by_arrival if by <= self._next else self._by_due)[0]
        return max(0.0, self._next - time.monotonic()) if is_next and not self._is_taken else None
