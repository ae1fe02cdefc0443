"""Lines on standard error that say what a command is at, for work whose length is not known."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flows.terminal.console import POLL_SECONDS, print_progress
from nested_core.text.stages import receiving_stages

SECONDS_BEFORE_FIRST_LINE = 0.5  # after Python's own start: two seconds in all
SECONDS_BETWEEN_REPEATS = 10.0  # of a stage that lasts


@contextmanager
def showing_stages(first: str) -> Iterator[None]:
    """Show what the block logs to `nested_core.text.stages`, a line at once and then now and then.

    first: the stage until the block logs one. A stage that lasts is shown again with the seconds
    since the block began, so that slow work is told from work that hangs.
    """
    lines = _StageLines(first)
    with receiving_stages(lines.begin_stage):
        lines.start()
        try:
            yield
        finally:
            lines.done.set()
            lines.join()


class _StageLines(threading.Thread):
    """Prints the stage that the work is at, from a thread of its own."""

    def __init__(self, first: str) -> None:
        super().__init__(name="stage-lines", daemon=True)
        self.done = threading.Event()
        self._began = time.monotonic()
        self._stage = first

    def begin_stage(self, stage: str) -> None:
        """The work is at another stage now."""
        self._stage = stage

    def run(self) -> None:
        """Print until the work is done."""
        printed, due = "", self._began + SECONDS_BEFORE_FIRST_LINE
        while not self.done.wait(POLL_SECONDS):
            stage, now = self._stage, time.monotonic()
            if now < due:
                continue
            print_progress(stage if stage != printed else f"{stage} ({now - self._began:.0f} s)")
            printed = stage
            due = now + SECONDS_BETWEEN_REPEATS
