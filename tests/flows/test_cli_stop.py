"""A run that is stopped by a signal and by another process, watched, and brought to its end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nested_core.storage.adapter import read_adapter
from tests.example import write_config
from tests.flows.conftest import Ended, called, ended, start
from tests.waiting import wait_until

pytestmark = pytest.mark.slow("two processes that train, stopped, and a verdict")
TRAIN = ("train", "-c", "config.yaml", "--run-dir", "run", "--json")


def steps_done(run_dir: Path) -> int:
    """The step of the last whole line of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return int(json.loads(lines[-1])["step"]) if lines else -1


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    wait_until(lambda: steps_done(run_dir) >= step, f"step {step}", process)


@dataclass
class Story:
    """What each process of the story ended with."""

    run_dir: Path
    pid: int = 0
    watched: dict[str, Any] = field(default_factory=dict)
    outcomes: dict[str, Ended] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Train; look; try to train beside it; SIGINT; resume; `stop`; resume to an end near by."""
    folder = tmp_path_factory.mktemp("stopped")
    write_config(folder / "config.yaml", iters=5000, val_batches=1, steps_per_report=2)
    told = Story(folder / "run")

    def command(*arguments: object) -> Ended:
        return called(*arguments, cwd=folder)

    def training(*more: str, until: int) -> subprocess.Popen[str]:
        process = start(*TRAIN, *more, cwd=folder)
        wait_for_step(process, told.run_dir, until)
        return process

    first = training(until=4)
    told.pid = first.pid
    told.watched = command("status", "run", "--json").document
    told.outcomes["beside"] = command(*TRAIN, "--resume")
    first.send_signal(signal.SIGINT)
    told.steps["reported"] = steps_done(told.run_dir)
    told.outcomes["signal"] = ended(first)
    told.outcomes["status"] = command("status", "run", "--json")
    told.steps["signal"] = told.outcomes["status"].document["step"]
    second = training("--resume", until=told.steps["signal"] + 4)
    told.outcomes["stop"] = command("stop", "run")
    told.outcomes["stopped"] = ended(second)
    told.outcomes["stop nothing"] = command("stop", "run")
    newest = max((told.run_dir / "checkpoints").iterdir()).name
    told.steps["last"] = int(newest.removeprefix("step-")) + 4
    told.outcomes["end"] = command(*TRAIN, "--resume", "--iters", told.steps["last"])
    return told


def test_a_run_can_be_watched_while_it_trains(story: Story) -> None:
    assert (story.watched["state"], story.watched["process"]) == ("running", story.pid)
    assert story.watched["step"] >= 4
    assert story.watched["iterations"] == 5000
    assert story.watched["current_train_loss"] > 0
    assert story.watched["verdict"] is None


def test_a_second_process_on_the_run_is_refused_with_the_first_ones_id(story: Story) -> None:
    refused = story.outcomes["beside"]
    assert refused.code == 2
    assert f"in use by process {story.pid}" in refused.message()


def test_sigint_checkpoints_after_the_step_in_hand_and_exits_5(story: Story) -> None:
    stopped = story.outcomes["signal"]
    assert stopped.code == 5
    (step,) = re.findall(r"Training was stopped at step (\d+) of 5000", stopped.message())
    assert "--run-dir run --resume" in stopped.message()
    # The report of every second step may be in hand, and with it the step after that.
    assert int(step) <= story.steps["reported"] + 4
    assert story.outcomes["status"].document["state"] == "resumable"
    assert story.outcomes["status"].document["process"] is None


def test_stop_asks_the_training_process_which_exits_5(story: Story) -> None:
    assert story.outcomes["stop"].code == 0
    assert "asked process" in story.outcomes["stop"].stdout
    assert story.outcomes["stopped"].code == 5
    assert "Training was stopped at step" in story.outcomes["stopped"].message()


def test_there_is_nothing_to_stop_where_no_process_trains(story: Story) -> None:
    assert story.outcomes["stop nothing"].code == 2
    assert "not being trained by any process" in story.outcomes["stop nothing"].message()


def test_the_resumed_run_ends_and_passes_the_gate(story: Story) -> None:
    done = story.outcomes["end"]
    assert done.code == 0, done.stderr
    assert done.document["step"] == story.steps["last"]
    assert done.document["verdict"] == "passed"
    steps = [
        json.loads(line)["step"]
        for line in (story.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps))
    assert len(read_adapter(story.run_dir / "adapter").tensors) == 42
