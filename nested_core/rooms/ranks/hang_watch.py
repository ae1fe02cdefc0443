"""The alarm that ends a rank which has waited too long for the others.

Where one rank no longer takes part, the others wait for it for ever, and no error comes. Each rank
sets an alarm of the system anew after each step. At SIGALRM faulthandler prints the stacks of the
process, which then ends (rank_worker.py registers that). So it works in an endless loop,
in a call that never returns, and without a network.
"""

from __future__ import annotations

import signal
import time
from collections import deque

LEAST_SECONDS = 60.0
TIMES_LONGEST_STEP = 10
REMEMBERED_STEPS = 20
# A step that compiles or follows an evaluation or a checkpoint may take so many times longer, and
# so may the next: what a step computed is waited for when the one after it is under way.
TIMES_LONGER = 10
LONG_STEPS = 2


class HangWatch:
    """Sets the alarm of this process; without a timeout it does nothing.

    Called at the same points of training in all ranks, so that all alarms go off together.
    """

    def __init__(self, timeout: float | str | None) -> None:
        """`timeout` is `training.hang_timeout`: seconds, `auto`, or None for no alarm."""
        self._timeout = timeout
        self._seconds: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._long_steps = 0
        self._last_step = time.monotonic()

    def after_step(self) -> None:
        """Note how long the step took, and allow the next one the time that follows from that."""
        now = time.monotonic()
        if self._long_steps > 0:
            self._long_steps -= 1
        else:
            self._seconds.append(now - self._last_step)
        self._last_step = now
        self._set_alarm()

    def allow_longer(self) -> None:
        """Allow more time until the next step: something else than steps is done before it."""
        self._long_steps = LONG_STEPS
        self._set_alarm()

    def end(self) -> None:
        """Turn the alarm off."""
        if self._timeout is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def seconds_allowed(self) -> float:
        """Return the time until the next step has to be done."""
        seconds = self._timeout
        if seconds is None or isinstance(seconds, str):
            seconds = max(LEAST_SECONDS, TIMES_LONGEST_STEP * max(self._seconds, default=0.0))
        return seconds * (TIMES_LONGER if self._long_steps > 0 else 1)

    def _set_alarm(self) -> None:
        if self._timeout is not None:
            signal.setitimer(signal.ITIMER_REAL, self.seconds_allowed())
