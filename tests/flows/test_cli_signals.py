"""SIGINT: the first ends a run with a checkpoint, the second at once, outside of training too."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nested_core.storage.checkpoint import latest_checkpoint
from nested_core.storage.checkpoint_verification import list_checkpoints
from tests.example import write_config
from tests.flows.conftest import called, completed, ended, start

TRAIN = ("train", "-c", "config.yaml", "--run-dir", "run")
SECONDS_TO_STOP = 10


def wait_until(process: subprocess.Popen[str], is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "run" / "checkpoints")]


def test_one_sigint_checkpoints_and_exits_5_within_10_seconds(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml", iters=5000, val_batches=1, steps_per_report=2)
    process = start(*TRAIN, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(process, lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    stopped = ended(process)
    assert time.monotonic() - began < SECONDS_TO_STOP
    assert stopped.code == 5
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert f"Training was stopped at step {checkpoint.step} of 5000" in stopped.message()


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
    wait_until(process, lambda: checkpoints(tmp_path) != [])
    time.sleep(0.5)  # well into the next step
    held = checkpoints(tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    killed = ended(process)
    assert time.monotonic() - began < 2
    assert killed.code == 130
    assert held == checkpoints(tmp_path)[: len(held)]
    resumed = completed(*TRAIN, "--resume", "--iters", 150, cwd=tmp_path)
    assert resumed.code in (0, 4), (
        resumed.stderr
    )  # one step; whether it was a good one is not asked
    assert checkpoints(tmp_path)[0] == held[0]


@pytest.mark.slow("trains and judges in two processes")
def test_a_signal_while_the_gate_judges_exits_5_and_the_resumed_run_is_judged(
    tmp_path: Path,
) -> None:
    write_config(tmp_path / "config.yaml", iters=4, val_batches=1)
    process = start(*TRAIN, cwd=tmp_path)
    result = tmp_path / "run" / "result.json"
    wait_until(process, result.exists)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.code == 5
    assert "what was done so far is on disk" in stopped.message()
    assert not (tmp_path / "run" / "gate.json").exists()
    resumed = completed(*TRAIN, "--resume", cwd=tmp_path)
    assert resumed.code in (0, 4), resumed.stderr
    assert (tmp_path / "run" / "gate.json").exists()


def test_a_folder_with_a_configuration_of_its_own_is_not_taken_for_a_run(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", iters=4)
    before = config.read_bytes()
    refused = called("train", "-c", config, "--run-dir", ".", "--resume", cwd=tmp_path)
    assert refused.code == 2
    assert "not a run directory" in refused.message()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert config.read_bytes() == before
