"""Ranks that wait for one that takes no part any more: they end, go on once, and say what was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nested_core.errors import TrainingProcessLost
from nested_core.pipeline import steps
from nested_core.records.plan import read_plan
from nested_core.storage.run_directory import RunDirectory
from tests.example import prepare
from tests.rooms.ranks.astray_ranks import go_astray

WAITS = {
    "iters": 12,
    "save_every": 4,
    "nested": {"frequencies": [1]},
    "training": {"hang_timeout": 12},
}


@pytest.mark.slow("trains two ranks, one of which is stopped, and waits for that to be noticed")
def test_ranks_that_wait_for_a_stopped_one_end_with_their_stacks_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = go_astray(monkeypatch, "stop", **WAITS)
    monkeypatch.setenv("ASTRAY_ONCE", str(tmp_path / "once"))
    run = prepare(config, tmp_path / "run")
    with pytest.warns(UserWarning, match="No rank of 2 took a step .* go on by themselves"):
        assert steps.train(config, run).step == 12
    printed = capfd.readouterr().err
    assert all(f"rank {rank} waited too long: " in printed for rank in (0, 1))
    plan = read_plan(run.plan)
    assert plan is not None
    assert (plan.resumed_at, plan.ended_by) == ((4,), ("hang_timeout",))


@pytest.mark.slow("trains two ranks, one of which does not end, and waits twice to notice that")
def test_a_rank_in_an_endless_loop_ends_the_run_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = go_astray(monkeypatch, "loop", **WAITS)
    run = prepare(config, tmp_path / "run")
    with (
        pytest.warns(UserWarning, match="go on by themselves"),
        pytest.raises(
            TrainingProcessLost, match=r"hang_timeout \(12\.0\).* Their stacks are above"
        ),
    ):
        steps.train(config, run)
    assert capfd.readouterr().err.count(" in wait_for_ever\n") == 2
    assert not run.result.exists()


@pytest.mark.reliability
@pytest.mark.timeout(14400)
@pytest.mark.usefixtures("forked_ranks")
def test_slow_steps_beside_busy_processes_are_not_taken_for_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"iters": 30, "save_every": 15, "training": {"hang_timeout": "auto"}}
    config = go_astray(monkeypatch, "slow", **WAITS | changes)
    first = prepare(config, tmp_path / "first")
    computing = [sys.executable, "-S", "-c", "while True: pass"]
    busy = [subprocess.Popen(computing) for _ in range(os.cpu_count() or 1)]
    try:
        for count in range(int(os.environ.get("RUNS", "4"))):
            monkeypatch.setenv("ASTRAY_SECONDS", ("0", "0.03", "0.1", "0.3")[count % 4])
            run = RunDirectory(tmp_path / f"run-{count}")
            shutil.copytree(first.path, run.path)
            assert steps.train(config, run).step == 30  # a false alarm warns, and fails
            with capsys.disabled():
                print(f"{count + 1} slow runs, load {os.getloadavg()[0]:.0f}", flush=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
