"""A signal outside of training: what the paragraph says to do can be done."""

from __future__ import annotations

import signal
from pathlib import Path

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
