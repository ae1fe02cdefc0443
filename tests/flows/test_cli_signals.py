"""SIGINT, SIGTERM and SIGHUP: a run ends with a checkpoint, a second SIGINT ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from flows import cli
from flows.process.stop_signals import STOPPING
from nested_core.storage.checkpoint_verification import list_checkpoints
from tests.example import write_config
from tests.flows.conftest import PROGRAM, completed, ended, start
from tests.waiting import wait_until

TRAIN = ("train", "-c", "config.yaml", "--run-dir", "run")


def interrupt(process: subprocess.Popen[str], *, sends_to_group: bool = False) -> None:
    """Send SIGINT, and wait until the process has heard it: a second one would merge with it."""
    send = os.killpg if sends_to_group else os.kill
    send(process.pid, signal.SIGINT)
    stderr: Iterable[str] = process.stderr or ()
    assert any(line.startswith(STOPPING) for line in stderr), f"exit {process.wait()}"


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "run" / "checkpoints")]


@pytest.mark.slow("waits for a step of some seconds, and does it again")
def test_a_second_sigint_in_a_long_step_exits_130_at_once_and_keeps_the_checkpoints(
    tmp_path: Path,
) -> None:
    changes: dict[str, Any] = {
        "batch_size": 8,
        "iters": 10**6,
        "grad_accumulation_steps": 150,  # some seconds a step
        "save_every": 1,
        "val_batches": 0,
        "nested": {"frequencies": [1]},
    }
    write_config(tmp_path / "config.yaml", **changes)
    process = start(*TRAIN, cwd=tmp_path)
    wait_until(lambda: checkpoints(tmp_path) != [], process=process)
    interrupt(process)
    held = checkpoints(tmp_path)
    process.send_signal(signal.SIGINT)
    killed = ended(process)
    assert killed.code == 130, "after the step it would be 5"
    assert held == checkpoints(tmp_path)
    resumed = completed(*TRAIN, "--resume", "--iters", 150, cwd=tmp_path)
    assert resumed.code in (0, 4), (
        resumed.stderr
    )  # one step; whether it was a good one is not asked
    assert checkpoints(tmp_path)[0] == held[0]


@pytest.mark.slow("trains and judges in two processes")
def test_a_signal_while_the_gate_judges_exits_5_and_the_resumed_run_is_judged(tmp_path) -> None:
    write_config(tmp_path / "config.yaml", iters=4, val_batches=1)
    process = start(*TRAIN, cwd=tmp_path)
    result = tmp_path / "run" / "result.json"
    wait_until(result.exists, process=process)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.code == 5
    assert "is judged once the run goes on" in stopped.message()
    assert not (tmp_path / "run" / "gate.json").exists()
    resumed = completed(*TRAIN, "--resume", cwd=tmp_path)
    assert resumed.code in (0, 4), resumed.stderr
    assert (tmp_path / "run" / "gate.json").exists()


def test_an_interrupt_while_the_program_imports_ends_it_without_a_traceback(tmp_path: Path) -> None:
    """A module that it imports first presses Ctrl-C."""
    (tmp_path / "difflib.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.run(
        [PROGRAM, "runs"],
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # nohup ignores it
    )
    assert (process.returncode, process.stderr) == (-signal.SIGINT, "")


def test_sigterm_leaves_a_command_by_an_exception_so_that_its_temporary_files_go(
    tmp_path: Path,
) -> None:
    def work() -> None:
        with cli._hearing_signals(is_program=True), TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    with pytest.raises(SystemExit) as ended_by:
        work()
    assert ended_by.value.code == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


CLOSED_TERMINAL = """
import os, signal, sys
from pathlib import Path
from tempfile import TemporaryDirectory
from flows import cli
from flows.process.stop_signals import Stopper
from nested_core.errors import TrainingStopped
from nested_core.storage.run_directory import RunDirectory

def hang_up():
    os.kill(os.getpid(), signal.SIGHUP)

with cli._hearing_signals(is_program=True), TemporaryDirectory(dir=sys.argv[1]) as folder:
    try:
        with Stopper().handling_signals(RunDirectory(Path(folder))):
            hang_up()
            print("goes on")
    except TrainingStopped:
        print("stopped")
    try:
        hang_up()
    finally:
        hang_up()  # a terminal may send several
"""


@pytest.mark.parametrize(
    ("handler", "code", "told"), [("SIG_DFL", 129, "stopped\n"), ("SIG_IGN", 0, "goes on\n")]
)
def test_a_closed_terminal_stops_as_sigterm_does_but_not_under_nohup(
    tmp_path: Path, handler: str, code: int, told: str
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", CLOSED_TERMINAL, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, getattr(signal, handler)),
    )
    assert (process.returncode, process.stdout) == (code, told)
    assert list(tmp_path.iterdir()) == []
