"""STOP_SIGNALS and `nested-tune stop` as a graceful stop; a second SIGINT exits at once."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from flows.terminal.console import print_progress, show_cursor
from nested_core.errors import BEGIN_AGAIN, TrainingStopped, go_on_with
from nested_core.process.command_parent import STOP_SIGNALS
from nested_core.storage.run_directory import RunDirectory

INTERRUPTED_EXIT_CODE = 130
STOPPING = "stopping: the step in hand is finished, and a checkpoint written where a step is done"
STOPPING_NOW = "stopping: nothing is trained at the moment, so this ends within seconds"
STOPPED = "Stopped outside of training"
SECONDS_TO_STOP = 4.0  # of what is not training; a matrix product on a CPU can take far longer
SECONDS_BETWEEN_LOOKS = 0.5  # for the request of `nested-tune stop`


class _StopNow(BaseException):
    """A signal outside of training; no `except Exception` on its way takes it for an error."""


class Stopper:
    """Asks the trainer to stop at a signal; where none trains, the block ends there.

    A handler in Python waits for the computation in hand. A thread hears of signals as they come:
    it says that the run is stopping, and ends the process at a second SIGINT.

    ends_process: whether that thread also ends the process where nothing trains and the main
        thread is still computing after SECONDS_TO_STOP.
    """

    def __init__(self, *, ends_process: bool = False) -> None:
        self._ends_process = ends_process
        self._trainer: Any = None
        self._is_stopping = False
        self._has_left = threading.Event()  # the block
        self._lock = threading.Lock()  # no signal is sent once the block has been left

    def direct_signals_to(self, trainer: Any) -> None:
        """Stop this trainer from now on; at once where the signal reached one before it."""
        self._trainer = trainer
        if self._is_stopping:
            trainer.stop_training()

    def release_trainer(self) -> None:
        """Training is over: what a signal asked for in its last moments is done now."""
        self._trainer = None
        if self._is_stopping:
            raise _StopNow(STOPPED)

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
        threading.Thread(target=self._hear_signals, args=(receive, run), daemon=True).start()
        before = {number: signal.signal(number, self._handle_signal) for number in STOP_SIGNALS}
        fd_before = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
        try:
            yield
        except _StopNow:
            raise _stopped_outside_of_training(run) from None
        finally:
            with self._lock:
                self._has_left.set()
            signal.set_wakeup_fd(fd_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(send)

    def _handle_signal(self, number: int, frame: object) -> None:
        if self._is_stopping:
            return
        self._is_stopping = True
        if self._trainer is None:
            raise _StopNow(STOPPED)
        self._trainer.stop_training()

    def _hear_signals(self, receive: int, run: RunDirectory) -> None:
        """Read signal numbers as they come, until the other end is closed."""
        deadline: float | None = None
        has_come = False
        with open(receive, "rb", buffering=0) as numbers:
            while True:
                if not select.select([numbers], [], [], SECONDS_BETWEEN_LOOKS)[0]:
                    if not has_come:
                        self._take_request(run)
                    if deadline is not None and time.monotonic() > deadline:
                        self._end_process(run)
                    continue
                if not (number := numbers.read(1)):
                    return
                if number[0] not in STOP_SIGNALS:
                    continue
                if has_come and number[0] == signal.SIGINT:
                    show_cursor()
                    os._exit(INTERRUPTED_EXIT_CODE)
                if not has_come:
                    is_training = self._trainer is not None
                    if self._ends_process and not is_training:
                        deadline = time.monotonic() + SECONDS_TO_STOP
                    with suppress(OSError):  # nobody reads standard error any more
                        print_progress(STOPPING if is_training else STOPPING_NOW)
                has_come = True

    def _take_request(self, run: RunDirectory) -> None:
        """Where nothing trains, make a signal of the request of `nested-tune stop`.

        A trainer looks for it itself.
        """
        with self._lock:
            if self._trainer is not None or self._has_left.is_set():
                return
            if run.is_locked_here() and run.stop_request.exists():
                run.stop_request.unlink(missing_ok=True)
                os.kill(os.getpid(), signal.SIGTERM)

    def _end_process(self, run: RunDirectory) -> None:
        """End the process in the middle of a computation, as if that had been stopped.

        What is on disk is complete at any moment, as after a kill.
        """
        with self._lock:
            if self._has_left.is_set():
                return
            stopped = _stopped_outside_of_training(run)
            if run.has_begun_training():
                from nested_core.report.run_report import write_report_of_ended_run

                write_report_of_ended_run(run, str(stopped))
            show_cursor()
            with suppress(OSError):
                print_progress(f"nested-tune: {stopped}")
            os._exit(stopped.exit_code)


def _stopped_outside_of_training(run: RunDirectory) -> TrainingStopped:
    """What a stop interrupted where nothing was trained, and how to go on."""
    if not run.is_nonempty():
        return TrainingStopped("Stopped before anything was done.", advice=BEGIN_AGAIN)
    message = f"{STOPPED}: what was done so far is on disk."
    if run.result.exists() and not run.gate.exists():
        message = (
            "Stopped after training, before there was a verdict: the trained adapter is on disk, "
            "and is judged once the run goes on."
        )
    return TrainingStopped(message, advice=go_on_with(run.path))
