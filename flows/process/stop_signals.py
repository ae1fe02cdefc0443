"""SIGINT and SIGTERM as a graceful stop; a second SIGINT exits at once, within a step too."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from flows.terminal.console import print_progress, show_cursor
from nested_core.errors import BEGIN_AGAIN, TrainingStopped, go_on_with
from nested_core.storage.run_directory import RunDirectory

INTERRUPTED_EXIT_CODE = 130
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = "stopping: the step in hand is finished and a checkpoint written"


class _StopNow(BaseException):
    """A signal outside of training; no `except Exception` on its way takes it for an error."""


class Stopper:
    """Asks the trainer to stop at a signal; where none trains, the block ends there.

    A handler in Python waits for the computation in hand. A thread hears of signals as they come:
    it says that the run is stopping, and ends the process at a second SIGINT.
    """

    def __init__(self) -> None:
        self._trainer: Any = None
        self._is_stopping = False

    def direct_signals_to(self, trainer: Any) -> None:
        """Stop this trainer from now on."""
        self._trainer = trainer

    def release_trainer(self) -> None:
        """Training is over: what a signal asked for in its last moments is done now."""
        self._trainer = None
        if self._is_stopping:
            raise _StopNow

    @contextmanager
    def handling_signals(self, run: RunDirectory) -> Iterator[None]:
        """Handle the signals while the block works on a run; TrainingStopped where one came.

        Signals reach the main thread alone: in any other the block only runs.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        receive, send = os.pipe()
        os.set_blocking(send, False)
        threading.Thread(target=self._hear_signals, args=(receive,), daemon=True).start()
        before = {number: signal.signal(number, self._handle_signal) for number in STOP_SIGNALS}
        fd_before = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
        try:
            yield
        except _StopNow:
            if not run.is_nonempty():
                message = "Stopped before anything was done."
                raise TrainingStopped(message, advice=BEGIN_AGAIN) from None
            message = "Stopped outside of training: what was done so far is on disk."
            raise TrainingStopped(message, advice=go_on_with(run.path)) from None
        finally:
            signal.set_wakeup_fd(fd_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(send)

    def _handle_signal(self, number: int, frame: Any) -> None:
        if self._is_stopping:
            return
        self._is_stopping = True
        if self._trainer is None:
            raise _StopNow
        self._trainer.stop_training()

    def _hear_signals(self, receive: int) -> None:
        """Read signal numbers as they come, until the other end is closed."""
        has_come = False
        with open(receive, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] not in STOP_SIGNALS:
                    continue
                if has_come and number[0] == signal.SIGINT:
                    show_cursor()
                    os._exit(INTERRUPTED_EXIT_CODE)
                if not has_come and self._trainer is not None:
                    with suppress(OSError):  # nobody reads standard error any more
                        print_progress(STOPPING)
                has_come = True
