"""A limit on the time that a chat template may take, since it is a program of the model's author.

It may loop endlessly. A watching thread raises TemplateTooSlow in the thread that renders. Python
delivers it between two operations: loops end, but a single long operation is finished first.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Of the process's time on the CPU; most templates take less than a millisecond.
BASE_LIMIT_SECONDS = 3.0
EXTRA_SECONDS_PER_CHARACTER = 1e-5  # more for what is long: tokenising it counts too
POLL_SECONDS = 0.25


class TemplateTooSlow(BaseException):
    """A chat template exceeded its time limit; a BaseException, so the template cannot catch it."""


class TemplateTimeLimit:
    """Limits the time of the blocks of `watching` in the thread that created it."""

    def __init__(self, seconds: float = BASE_LIMIT_SECONDS) -> None:
        """Create it for the current thread.

        seconds: the process time that every text may take; longer texts may take more.
        """
        self._seconds = seconds
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._deadline: float | None = None  # of the template that is rendered now
        self._closed = threading.Event()
        self._watcher = threading.Thread(
            target=self._watch_deadline, name="template limit", daemon=True
        )

    def __enter__(self) -> TemplateTimeLimit:
        """Start the watching thread."""
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the watching thread."""
        self._closed.set()
        self._watcher.join()

    @contextmanager
    def watching(self, characters: int) -> Iterator[None]:
        """Raise TemplateTooSlow in the block if it takes longer than a text of this length may."""
        self._deadline = (
            time.process_time() + self._seconds + EXTRA_SECONDS_PER_CHARACTER * characters
        )
        try:
            yield
        except TemplateTooSlow:
            raise
        except BaseException:
            self._finish_watched_block()
            raise
        self._finish_watched_block()

    def _finish_watched_block(self) -> None:
        """End the time limit.

        If the watcher has just raised, wait for its exception and swallow it.
        """
        with self._lock:
            has_raised = self._deadline is None
            self._deadline = None
        if has_raised:
            try:
                while True:
                    time.sleep(POLL_SECONDS)
            except TemplateTooSlow:
                pass

    def _watch_deadline(self) -> None:
        """Raise TemplateTooSlow in the watched thread whenever its deadline has passed."""
        while not self._closed.wait(POLL_SECONDS):
            with self._lock:
                if self._deadline is not None and time.process_time() > self._deadline:
                    self._deadline = None
                    # It is raised at the thread's next operation
                    thread, error = ctypes.c_ulong(self._thread), ctypes.py_object(TemplateTooSlow)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)
