"""A signal outside of training: what the paragraph says to do can be done."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows.process.stop_signals import Stopper
from nested_core.errors import TrainingStopped
from nested_core.storage.run_directory import RunDirectory


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_has_not_begun_is_begun_again(tmp_path: Path, number: signal.Signals) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(TrainingStopped, match="Begin again"), Stopper().handling_signals(run):
        signal.raise_signal(number)


def test_a_run_that_has_begun_goes_on_with_resume(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with (
        pytest.raises(TrainingStopped, match=f"--run-dir {run.path} --resume"),
        run.locked(),
        Stopper().handling_signals(run),
    ):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_after_one_trainer_stops_the_next_one_of_the_run(tmp_path: Path) -> None:
    stopped: list[str] = []
    first, then = (
        SimpleNamespace(stop_training=partial(stopped.append, name)) for name in ("first", "then")
    )
    stopper = Stopper()
    with stopper.handling_signals(RunDirectory(tmp_path / "run")):
        stopper.direct_signals_to(first)
        signal.raise_signal(signal.SIGTERM)  # as it opens the run again, with more steps
        stopper.direct_signals_to(then)
    assert stopped == ["first", "then"]


def _request_stop(run: RunDirectory) -> None:
    run.result.touch()
    run.stop_request.touch()
    time.sleep(60)


def test_a_stop_request_outside_of_training_is_a_stop_at_once(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with (
        pytest.raises(TrainingStopped, match="Stopped after training, before there was a verdict"),
        run.locked(),
        Stopper().handling_signals(run),
    ):
        _request_stop(run)
    assert not run.stop_request.exists()


COMPUTING = """
import hashlib, sys, threading
from pathlib import Path
from flows.process import stop_signals
from nested_core.storage.run_directory import RunDirectory

stop_signals.SECONDS_TO_STOP = 0.1
run = RunDirectory(Path(sys.argv[1]))
with run.locked(), stop_signals.Stopper(ends_process=True).handling_signals(run):
    threading.Timer(0.3, print, ("computing",), {"flush": True}).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, without a look at signals
"""


def test_a_computation_outside_of_training_is_not_waited_for(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMPUTING, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=60)
    assert process.returncode == 5, printed
    assert printed.splitlines()[0].startswith("stopping: nothing is trained")
    assert printed.splitlines()[-1].endswith(f"--run-dir {tmp_path / 'run'} --resume.")
