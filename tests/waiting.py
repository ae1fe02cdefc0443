"""Waiting for an event instead of for a time: with a limit that a loaded machine does not reach."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

SECONDS = 600.0  # less than a test may take
SECONDS_BETWEEN_LOOKS = 0.02


def wait_until(
    is_so: Callable[[], bool],
    what: str | Callable[[], str] = "it",
    process: subprocess.Popen[Any] | None = None,
) -> None:
    """Return once `is_so` is true; AssertionError where it is not within SECONDS.

    process: the one that is waited for: that it has ended before is an error too. It is killed
    where the wait fails, so that it does not go on beside the tests that follow.
    """
    deadline = time.monotonic() + SECONDS
    try:
        while not is_so():
            if process is not None:
                assert process.poll() is None, process.communicate()
            if time.monotonic() > deadline:
                words = what if isinstance(what, str) else what()
                raise AssertionError(f"{words} was not so within {SECONDS:.0f} seconds")
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except BaseException:
        if process is not None:
            process.kill()
        raise
