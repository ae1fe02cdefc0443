"""`nested-tune train` in two processes: stopped, killed and resumed, it behaves like one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nested_core.storage.checkpoint import latest_checkpoint, list_checkpoints
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.metrics import read_metrics
from tests.example import write_config
from tests.flows.conftest import ended, start

pytestmark = [
    pytest.mark.timeout(400),  # several processes, one after the other
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]

TRAIN = ("train", "-c", "config.yaml", "--run-dir", "run")
SECONDS_TO_END = 15
PROGRAM = "nested_core.pipeline.worker"


def ranks_of(folder: Path) -> dict[int, int]:
    """The process ids of the ranks that train in a folder's run, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((e for e in environment if e.startswith(b"MLX_RANK=")), None)
        if rank is not None and PROGRAM.encode() in words and str(folder / "run").encode() in words:
            found[int(rank.split(b"=")[1])] = int(entry.name)
    return found


def processes_of(folder: Path) -> list[str]:
    """Every process that has the folder's run in its command line: ranks, mlx.launch, the guard."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder / "run") in words:
            found.append(words.replace("\0", " "))
    return found


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Runs that a test starts; what is left of them when it fails is ended."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def begin(folder: Path, step: int, started: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """A run of two ranks that has reported this step or a later one, and has checkpoints."""
    write_config(
        folder / "config.yaml",
        iters=400,
        batch_size=4,
        val_batches=1,
        steps_per_report=2,
        save_every=2,
        training={"processes": 2, "max_grad_norm": 1.0},
    )
    process = start(*TRAIN, cwd=folder)
    started.append(process)
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 240
    while step_of(metrics) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def step_of(metrics: Path) -> int:
    records = read_metrics(metrics)
    return int(records[-1]["step"]) if records else -1


def none_left(folder: Path, seconds: float) -> bool:
    """Whether every process of the run is gone within so many seconds."""
    deadline = time.monotonic() + seconds
    while processes_of(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def finish(folder: Path, iters: int) -> None:
    """Resume the run to a few steps more, and see that it goes on from its last checkpoint."""
    held = latest_checkpoint(folder / "run" / "checkpoints")
    assert held is not None
    assert held.step < iters
    done = ended(start(*TRAIN, "--resume", "--json", "--iters", iters, cwd=folder))
    assert done.code in (0, 4), done.stderr  # whether it was a good run is not asked
    steps = [record["step"] for record in read_metrics(folder / "run" / "metrics.jsonl")]
    assert steps == sorted(set(steps)) == [0, *range(2, iters + 1, 2)]
    assert list_checkpoints(folder / "run" / "checkpoints")[-1].name == f"step-{iters:07d}"
    assert none_left(folder, 2)


def next_even(folder: Path) -> int:
    held = latest_checkpoint(folder / "run" / "checkpoints")
    assert held is not None
    return held.step // 4 * 4 + 8


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_ends_all_within_15_seconds_and_the_run_resumes(
    tmp_path: Path, rank: int, started: list[subprocess.Popen[str]]
) -> None:
    process = begin(tmp_path, 6, started)
    ranks = ranks_of(tmp_path)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[rank], signal.SIGKILL)
    began = time.monotonic()
    failed = ended(process, SECONDS_TO_END)
    assert none_left(tmp_path, SECONDS_TO_END - (time.monotonic() - began))
    assert failed.code == 1
    assert f"Rank {rank} of 2 exited with code -9" in failed.stderr
    assert "--run-dir run --resume" in failed.stderr
    assert RunDirectory(tmp_path / "run").holder() is None
    finish(tmp_path, next_even(tmp_path))


def test_sigterm_ends_both_ranks_at_one_step_with_a_checkpoint_and_exit_5(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    process = begin(tmp_path, 6, started)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    stopped = ended(process, SECONDS_TO_END)
    assert time.monotonic() - began < SECONDS_TO_END
    assert stopped.code == 5
    checkpoint = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    assert f"Training was stopped at step {checkpoint.step} of 400" in stopped.stderr
    assert none_left(tmp_path, 2)
    finish(tmp_path, next_even(tmp_path))


def test_nested_tune_stop_stops_the_ranks_and_a_second_run_there_is_refused(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    process = begin(tmp_path, 2, started)
    refused = ended(start(*TRAIN, "--resume", cwd=tmp_path))
    assert refused.code == 2
    assert f"in use by process {process.pid}" in refused.stderr
    assert ended(start("stop", "run", cwd=tmp_path)).code == 0
    assert ended(process, SECONDS_TO_END).code == 5
    assert none_left(tmp_path, 2)


def test_no_rank_outlives_the_process_that_started_it(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    process = begin(tmp_path, 4, started)  # that of step 2 has been kept by then
    process.kill()
    assert none_left(tmp_path, 3), processes_of(tmp_path)
    process.communicate()
    finish(tmp_path, next_even(tmp_path))


def test_a_batch_that_the_ranks_cannot_share_exits_2(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml", batch_size=3, training={"processes": 2})
    refused = ended(start(*TRAIN, cwd=tmp_path))
    assert refused.code == 2
    assert "batch_size 3 is the batch of all ranks together" in refused.message()
    assert not (tmp_path / "run").exists()
