"""`nested-tune train` in two processes: stopped, killed and resumed, it behaves like one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nested_core.records.metrics import read_metrics
from nested_core.storage.checkpoint import latest_checkpoint
from nested_core.storage.checkpoint_verification import list_checkpoints
from nested_core.storage.run_directory import RunDirectory
from tests.example import write_config
from tests.flows.conftest import Ended, called, completed, ended, start
from tests.production.processes import ranks_of, step_of
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
]

TRAIN = ("train", "-c", "config.yaml", "--run-dir", "run")
SECONDS_TO_END = 240  # on a machine that does much else; 2 to 5 on a quiet one


def processes_of(folder: Path) -> list[str]:
    """Every process that has the folder's run in its command line: ranks and mlx.launch."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder / "run") in words:
            found.append(words.replace("\0", " "))
    return found


def none_left(folder: Path, seconds: float) -> bool:
    """Whether every process of the run is gone within so many seconds."""
    deadline = time.monotonic() + seconds
    while processes_of(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@dataclass(frozen=True)
class Ending:
    """How a run of two ranks ended, and what it left."""

    ended: Ended
    seconds: float
    is_none_left: bool
    checkpoint: int
    holder: int | None


@dataclass
class Story:
    """A run that is ended in four ways and resumed after each, and its ranks at the beginning."""

    folder: Path
    ranks: list[int] = field(default_factory=list)
    pid_of_stopped: int = 0
    refused: Ended | None = None
    stop: Ended | None = None
    endings: dict[str, Ending] = field(default_factory=dict)

    def begin(self, *flags: str) -> subprocess.Popen[str]:
        """Start or resume the run, and wait until it has reported a step that it keeps."""
        metrics = self.folder / "run" / "metrics.jsonl"
        wanted = (
            max(step_of(metrics), 0) + 4
        )  # a step that is reported has a checkpoint by the next
        process = start(*TRAIN, *flags, cwd=self.folder)
        wait_until(lambda: step_of(metrics) >= wanted, f"step {wanted}", process)
        return process

    def end(self, name: str, process: subprocess.Popen[str], seconds: float) -> None:
        """Wait for the end of a process that has been told or made to end."""
        began = time.monotonic()
        outcome = ended(process, SECONDS_TO_END)
        is_none_left = none_left(self.folder, seconds)
        checkpoint = latest_checkpoint(self.folder / "run" / "checkpoints")
        assert checkpoint is not None
        holder = RunDirectory(self.folder / "run").holder()
        took = time.monotonic() - began
        self.endings[name] = Ending(outcome, took, is_none_left, checkpoint.step, holder)


def new_story(folder: Path) -> Story:
    """A story that has not begun."""
    write_config(
        folder / "config.yaml",
        iters=4000,
        batch_size=4,
        val_batches=1,
        steps_per_report=2,
        save_every=2,
        training={"processes": 2, "max_grad_norm": 1.0},
    )
    return Story(folder)


def kill_rank(story: Story, rank: int) -> None:
    """Begin the run, and kill one of its ranks."""
    process = story.begin()
    ranks = ranks_of(story.folder)
    story.ranks = sorted(ranks)
    os.kill(ranks[rank], signal.SIGKILL)
    story.end(f"rank {rank}", process, SECONDS_TO_END)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Kill a rank, SIGTERM, `stop`, kill the parent; resume after each, and then to an end."""
    story = new_story(tmp_path_factory.mktemp("ranks"))
    kill_rank(story, 1)

    process = story.begin("--resume")
    process.send_signal(signal.SIGTERM)
    story.end("signal", process, 2)

    process = story.begin("--resume")
    story.pid_of_stopped = process.pid
    story.refused = completed(*TRAIN, "--resume", cwd=story.folder)
    story.stop = completed("stop", "run", cwd=story.folder)
    story.end("stop", process, 2)

    process = story.begin("--resume")
    process.kill()
    story.end("parent", process, 3)
    return story


def assert_ended_with_rank(story: Story, rank: int) -> None:
    failed = story.endings[f"rank {rank}"]
    assert story.ranks == [0, 1]
    assert failed.is_none_left
    assert failed.seconds < SECONDS_TO_END
    assert failed.ended.code == 1
    assert f"Rank {rank} of 2 exited with code -9" in failed.ended.stderr
    assert "--run-dir run --resume" in failed.ended.stderr
    assert failed.holder is None


@pytest.mark.slow("trains two ranks, ended in four ways and resumed after each")
def test_a_rank_killed_ends_all_within_15_seconds(story: Story) -> None:
    assert_ended_with_rank(story, 1)


@pytest.mark.reliability
def test_the_main_rank_killed_ends_all_within_15_seconds(tmp_path: Path) -> None:
    story = new_story(tmp_path)
    kill_rank(story, 0)
    assert_ended_with_rank(story, 0)


@pytest.mark.slow("trains two ranks, ended in four ways and resumed after each")
def test_sigterm_ends_both_ranks_at_one_step_with_a_checkpoint_and_exit_5(story: Story) -> None:
    stopped = story.endings["signal"]
    assert stopped.seconds < SECONDS_TO_END
    assert stopped.ended.code == 5
    assert f"Training was stopped at step {stopped.checkpoint} of 4000" in stopped.ended.stderr
    assert stopped.is_none_left


@pytest.mark.slow("trains two ranks, ended in four ways and resumed after each")
def test_nested_tune_stop_stops_the_ranks_and_a_second_run_there_is_refused(story: Story) -> None:
    assert story.refused is not None
    assert story.refused.code == 2
    assert f"in use by process {story.pid_of_stopped}" in story.refused.stderr
    assert story.stop is not None
    assert story.stop.code == 0
    assert story.endings["stop"].ended.code == 5
    assert story.endings["stop"].is_none_left


@pytest.mark.slow("trains two ranks, ended in four ways and resumed after each")
def test_no_rank_outlives_the_process_that_started_it(story: Story) -> None:
    assert story.endings["parent"].is_none_left


@pytest.mark.slow("trains two ranks, ended in four ways and resumed after each")
def test_a_run_that_was_killed_and_stopped_goes_on_from_its_last_checkpoint_each_time(
    story: Story,
) -> None:
    kept = [ending.checkpoint for ending in story.endings.values()]
    assert len(kept) == 4
    assert kept == sorted(set(kept))
    iters = kept[-1] // 4 * 4 + 8
    done = completed(*TRAIN, "--resume", "--json", "--iters", iters, cwd=story.folder)
    assert done.code in (0, 4), done.stderr  # whether it was a good run is not asked
    steps = [record["step"] for record in read_metrics(story.folder / "run" / "metrics.jsonl")]
    assert steps == sorted(set(steps)) == [0, *range(2, iters + 1, 2)]
    assert list_checkpoints(story.folder / "run" / "checkpoints")[-1].name == f"step-{iters:07d}"
    assert none_left(story.folder, 2)


def test_a_batch_that_the_ranks_cannot_share_exits_2(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml", batch_size=3, training={"processes": 2})
    refused = called(*TRAIN, cwd=tmp_path)
    assert refused.code == 2
    assert "batch_size 3 is the batch of all ranks together" in refused.message()
    assert not (tmp_path / "run").exists()
