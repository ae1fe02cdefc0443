"""`train` where its process is killed: it goes on by itself, and ends as if nothing had been."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nested_core.errors import TrainingProcessLost
from nested_core.storage.run_directory import RunDirectory
from tests.example import write_config
from tests.flows.conftest import Ended, completed, ended, start
from tests.waiting import wait_until

SETTINGS = {"iters": 60, "save_every": 20, "steps_per_eval": 20, "steps_per_report": 2}


def bytes_of(run: Path) -> dict[str, bytes]:
    """The adapter, and weights and optimizer state of every checkpoint."""
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*.safetensors"))}


def killed_by(number: int, folder: Path, *, after_lines: int) -> Ended:
    """`train` whose process is sent a signal once metrics.jsonl has so many lines."""
    process = start("train", "-c", "config.yaml", "--run-dir", "killed", cwd=folder)
    run = RunDirectory(folder / "killed")

    def has_come_so_far() -> bool:
        return run.metrics.exists() and run.metrics.read_text().count("\n") >= after_lines

    wait_until(has_come_so_far, process=process)
    assert run.holder() == process.pid
    (trains,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(trains), number)
    return ended(process)


@pytest.mark.slow("trains in a process of its own, twice")
def test_a_killed_run_ends_by_itself_with_the_bytes_of_one_that_nobody_killed(tmp_path) -> None:
    write_config(tmp_path / "config.yaml", **SETTINGS)
    plain = completed("train", "-c", "config.yaml", "--run-dir", "plain", cwd=tmp_path)
    assert plain.code == 0, plain.stderr
    killed = killed_by(signal.SIGSEGV, tmp_path, after_lines=15)
    assert killed.code == 0, killed.stderr
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "plain")
    said = "The training process was killed once (SIGSEGV) and went on by itself."
    assert said in killed.stdout
    assert said in RunDirectory(tmp_path / "killed").report.read_text()
    assert "ended by SIGSEGV" in killed.stderr


@pytest.mark.slow("trains in a process of its own that ends at the same step each time")
def test_one_that_dies_at_the_same_step_each_time_ends_with_the_cause(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", **SETTINGS | {"training": {"restarts": 2}})
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, threading, time\n"
        "def end():\n"
        "    while True:\n"
        "        try:\n"
        "            if open('run/metrics.jsonl').read().count('\\n') > 15: os.abort()\n"
        "        except OSError: pass\n"
        "        time.sleep(0.01)\n"
        "if 'flows.cli' in sys.orig_argv: threading.Thread(target=end, daemon=True).start()\n"
    )
    lost = ended(
        start("train", "-c", config, "--run-dir", "run", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    )
    assert lost.code == TrainingProcessLost.exit_code
    assert "3 times in a row without a new checkpoint" in lost.message()
    assert "ended by SIGABRT" in lost.message()
    assert "--resume" in lost.message()
