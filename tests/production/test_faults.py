"""Faults injected into what runs: nothing wrong is promoted, and no training is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from nested_core import registry as core
from nested_core.storage.checkpoint import latest_checkpoint
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.metrics_file import read_metrics
from tests.production.faults import FaultTable
from tests.production.stack import Stack, wait_for
from tests.production.test_production import add, announce, champion

pytestmark = [pytest.mark.production, pytest.mark.timeout(600)]

NAME = "events"  # the adapter that events are about
STEPS = 240
LONG: dict[str, Any] = {"iters": STEPS, "save_every": 10, "val_batches": 1, "steps_per_eval": 120}
SLOT_IS_FREE_WITHIN = 120
SECONDS_UNTIL_LAUNCHD_KILLS = 20  # launchd.plist(5), ExitTimeOut
# A worker reports the end of a run's process a second time, after it has imported the flow: a retry
# before that would be taken for the run that ended.
SECONDS_UNTIL_THE_WORKER_IS_DONE = 3


class Training:
    """A training run under way: its flow run, its directory, and how far it has come."""

    def __init__(self, stack: Stack, name: str, **changes: Any) -> None:
        self.stack = stack
        self.run = RunDirectory(stack.home / "runs" / name)
        section = {"path": "registry", "name": name, "promote": "always"}
        values = LONG | {"run_dir": f"runs/{name}", "registry": section} | changes
        self.name, self.steps = name, values["iters"]
        self.id = stack.submit("finetune/geography-manual", **values)

    def step(self) -> int:
        """The step of the last checkpoint on disk, 0 before the first."""
        checkpoint = (
            latest_checkpoint(self.run.checkpoints) if self.run.checkpoints.exists() else None
        )
        return 0 if checkpoint is None else checkpoint.step

    def until(self, step: int) -> Training:
        """Wait until a checkpoint of at least this step is there."""
        wait_for(lambda: self.step() >= step, 180)
        return self

    def final_state(self, began: float | None = None, seconds: float = 180) -> tuple[str, float]:
        """The type of the state that the run ends in, and the seconds since `began`."""
        ended = self.stack.wait(self.id, seconds=seconds)
        assert ended.state_type is not None
        return ended.state_type.value.capitalize(), time.monotonic() - (began or time.monotonic())

    def go_on(self, *, has_begun: bool = True) -> None:
        """Retry the run; it must end verified and promoted, having trained no step twice."""
        begun_at = self.step()
        wait_for(lambda: not self.stack.processes_of(self.id))
        time.sleep(SECONDS_UNTIL_THE_WORKER_IS_DONE)
        self.stack.retry(self.id)
        ends = ("Crashed", "Cancelled", "Failed")
        wait_for(lambda: self.stack.flow_run(self.id).state_name not in ends)
        self.end_promoted_once()
        assert begun_at > 0 or not has_begun

    def go_on_by_itself(self) -> None:
        """The automation resumes the run; it must end as one that a person has retried."""
        begun_at = self.step()
        wait_for(lambda: self.stack.flow_run(self.id).state_name != "Crashed", 120)
        message = self.end_promoted_once()
        assert message.startswith("crashed once, resumed by itself from step-"), message
        assert begun_at > 0

    def end_promoted_once(self) -> str:
        """Wait for the end, verified and promoted, with each step trained once; its message."""
        ended = self.stack.wait(self.id)
        assert ended.state is not None
        assert ended.state_name == "Promoted", ended.state.message
        assert str(ended.state.message).endswith("; promoted"), ended.state.message
        assert self.step() == self.steps
        steps = [record["step"] for record in read_metrics(self.run.metrics)]
        assert steps == sorted(set(steps))
        assert len(core.history(self.stack.registry, self.name)) == 1
        return str(ended.state.message)

    def said_of_its_crashes(self) -> list[str]:
        """What the runs of resume/auto for this run say, the last one first."""
        runs = self.stack.runs_of("resume/auto")
        own = [r for r in runs if r.parameters["config"]["flow_run"] == str(self.id)]
        own.sort(key=lambda run: str(run.created), reverse=True)
        return [str(run.state.message) for run in own if run.state and run.state.is_final()]

    def is_unpromoted(self) -> bool:
        folder = self.stack.registry / self.name
        return not folder.exists() or core.read_champion(self.stack.registry, self.name) is None


def test_kill_9_of_the_flow_process(stack: Stack, faults: FaultTable) -> None:
    training = Training(stack, "killed-flow").until(20)
    began = time.monotonic()
    os.kill(stack.flow_process(training.id), signal.SIGKILL)
    state, seconds = training.final_state(began)
    assert state == "Crashed"
    assert seconds < SLOT_IS_FREE_WITHIN
    assert training.is_unpromoted()
    held = f"checkpoint of step {training.step()}"
    training.go_on_by_itself()
    then = "goes on by itself, promoted once"
    faults.add("kill -9 of the flow process", state, held, seconds, then)


def test_cancelled_while_it_trains(stack: Stack, faults: FaultTable) -> None:
    cancel_and_retry(Training(stack, "cancelled").until(20), faults, "cancel while training")


def cancel_and_retry(training: Training, faults: FaultTable, row: str) -> None:
    """Cancel a training: it writes a checkpoint first, and goes on from there when retried."""
    began = time.monotonic()
    training.stack.prefect("flow-run", "cancel", str(training.id))
    state, seconds = training.final_state(began)
    assert state == "Cancelled"
    assert seconds < 30  # then it would have been killed
    wait_for(lambda: not training.stack.processes_of(training.id), 30)
    worker = (training.stack.folder / "worker-mlx-gpu.log").read_text()
    assert "status code: -11" not in worker  # a process that is cancelled ends in order
    assert training.is_unpromoted()
    last = read_metrics(training.run.metrics)[-1]["step"]
    assert training.step() >= last  # written at the cancel, and not only every ten steps
    held = f"checkpoint of step {training.step()}, written at the cancel"
    training.go_on()
    faults.add(row, state, held, seconds, "a retry resumes, promoted once")


def test_kill_9_of_the_worker_alone(stack: Stack, faults: FaultTable) -> None:
    training = Training(stack, "killed-worker").until(20)
    stack.workers["mlx-gpu"].kill()
    stack.workers["mlx-gpu"].wait()
    state, _ = training.final_state()
    assert state == "Completed"
    assert len(core.history(stack.registry, training.name)) == 1
    stack.start_worker("mlx-gpu")
    faults.add("kill -9 of the worker", state, "the finished run", 0, "training goes on without it")


def test_kill_9_of_worker_and_flow_process_and_of_what_goes_on_by_itself(
    stack: Stack, faults: FaultTable
) -> None:
    training = Training(stack, "killed-both", iters=2 * STEPS).until(20)
    began = time.monotonic()
    stack.workers["mlx-gpu"].kill()
    for process in stack.processes_of(training.id):
        os.kill(process, signal.SIGKILL)
    stack.workers["mlx-gpu"].wait()
    stack.start_worker("mlx-gpu")
    state, seconds = training.final_state(began)
    assert state == "Crashed"
    assert "No heartbeat for 90 seconds" in str(stack.flow_run(training.id).state)
    assert seconds < SLOT_IS_FREE_WITHIN
    begun_at = training.step()
    held = f"checkpoint of step {begun_at}"
    then = "goes on by itself"
    faults.add("kill -9 of worker and flow process", state, held, seconds, then)

    training.until(begun_at + 20)
    began = time.monotonic()
    os.kill(stack.flow_process(training.id), signal.SIGKILL)
    state, seconds = training.final_state(began)
    assert state == "Crashed"
    wait_for(lambda: len(training.said_of_its_crashes()) == 2, 120)
    again, first = training.said_of_its_crashes()
    assert first.endswith("goes on from its last checkpoint")
    assert again.endswith("crashed again: it stays Crashed until a Retry")
    assert stack.flow_run(training.id).state_name == "Crashed"
    assert training.is_unpromoted()
    held = f"checkpoint of step {training.step()}"
    training.go_on()
    then = "stays Crashed; a retry resumes, promoted once"
    faults.add("kill -9 of what goes on by itself", state, held, seconds, then)


def test_sigterm_to_the_worker(stack: Stack, faults: FaultTable) -> None:
    training = Training(stack, "worker-stopped").until(20)
    began = time.monotonic()
    worker = stack.workers["mlx-gpu"]
    worker.terminate()
    with suppress(subprocess.TimeoutExpired):
        worker.wait(SECONDS_UNTIL_LAUNCHD_KILLS)
    worker.kill()
    worker.wait()
    stack.start_worker("mlx-gpu")
    state, seconds = training.final_state(began)
    assert seconds < SLOT_IS_FREE_WITHIN
    held = f"checkpoint of step {training.step()}"
    then = "the training went on and was promoted once"
    if state != "Completed":
        assert state in ("Crashed", "Cancelled")
        assert training.is_unpromoted()
        if state == "Crashed":
            training.go_on_by_itself()
            goes_on = "it goes on by itself"
        else:
            training.go_on()
            goes_on = "a retry resumes"
        then = f"Prefect ended the run's process too; {goes_on}, promoted once"
    assert len(core.history(stack.registry, training.name)) == 1
    faults.add("SIGTERM to the worker", state, held, seconds, then)


def test_the_server_is_killed_for_a_minute_while_it_trains(
    stack: Stack, faults: FaultTable
) -> None:
    training = Training(stack, "no-server").until(20)
    stack.kill_server()
    time.sleep(60)
    stack.start_server()
    state, _ = training.final_state()
    held = f"checkpoint of step {training.step()}"
    faults.add("kill -9 of the server for 60 s", state, held, None, "training does not notice")
    assert state == "Completed"
    assert len(core.history(stack.registry, training.name)) == 1


def test_the_database_is_restarted_while_it_trains(stack: Stack, faults: FaultTable) -> None:
    training = Training(stack, "no-database").until(20)
    stack.database.stop()
    time.sleep(5)
    stack.database.start()
    state, _ = training.final_state()
    held = f"checkpoint of step {training.step()}"
    faults.add("database restarted", state, held, None, "training does not notice")
    assert state == "Completed"
    assert len(core.history(stack.registry, training.name)) == 1


@pytest.fixture
def small_disk(stack: Stack) -> Iterator[Path]:
    """A file system of 24 MB below home."""
    folder = stack.home / "runs" / "small"
    folder.mkdir(parents=True)
    mounting = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mounting, check=False).returncode != 0:
        pytest.skip("a small file system cannot be mounted: needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_disk_is_full_when_a_checkpoint_is_written(
    stack: Stack, faults: FaultTable, small_disk: Path
) -> None:
    training = Training(stack, "full-disk", run_dir="runs/small/run").until(0)
    training.run = RunDirectory(small_disk / "run")
    training.until(10)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"0" * 4096)
    began = time.monotonic()
    state, seconds = training.final_state(began)
    assert state == "Failed"
    assert "No space left" in str(stack.flow_run(training.id).state)
    held = f"checkpoint of step {training.step()}"
    filler.unlink()
    training.go_on()
    faults.add("disk full at a checkpoint", state, held, seconds, "room made, a retry resumes")


def promotions(stack: Stack) -> set[UUID]:
    return {run.id for run in stack.runs_of("promote/auto")}


def ended_promotions(stack: Stack, before: set[UUID], count: int) -> list[str]:
    """What the states of `count` new runs of promote/auto say, once all of them have ended."""

    def look() -> list[str]:
        new = [run for run in stack.runs_of("promote/auto") if run.id not in before]
        are_final = all(run.state is not None and run.state.is_final() for run in new)
        messages = [f"{run.state_name}: {run.state.message}" for run in new if run.state]
        return messages if len(new) >= count and are_final else []

    found: list[str] = wait_for(look, 120)
    return found


def test_the_event_comes_twice(stack: Stack, faults: FaultTable) -> None:
    version, before = add(stack, 21, name=NAME), promotions(stack)
    entries = len(core.history(stack.registry, NAME))
    announce(stack, version, NAME)
    announce(stack, version, NAME)
    said = sorted(ended_promotions(stack, before, 2))
    assert said == ["Completed: already_champion", "Promoted: promoted"]
    assert len(core.history(stack.registry, NAME)) == entries + 1
    faults.add("adapter.verified twice", " and ".join(said), "one change", None, "promoted once")


def test_the_event_is_forged(stack: Stack, faults: FaultTable, tmp_path: Path) -> None:
    now, before = champion(stack, NAME), promotions(stack)
    announce(stack, "0" * 64, NAME)
    announce(stack, str(now), NAME, registry=str(tmp_path))
    said = sorted(ended_promotions(stack, before, 2))
    assert [message.split(":")[0] for message in said] == ["Failed", "Failed"]
    assert any("has no version" in message for message in said)
    assert any("outside of the folders that this worker may use" in message for message in said)
    assert champion(stack, NAME) == now
    faults.add("adapter.verified forged", "Failed", "nothing", None, "nothing is promoted")


def test_the_event_is_malformed(stack: Stack, faults: FaultTable) -> None:
    now, before = champion(stack, NAME), promotions(stack)
    announce(stack, "not a version", NAME)
    time.sleep(15)
    assert promotions(stack) == before
    assert champion(stack, NAME) == now
    seen = {"event": {"name": ["prefect.automation.action.failed"]}}
    with stack.connected() as client:
        answer = client.request("POST", "/events/filter", json={"filter": seen}).json()
    assert answer["events"]
    faults.add("adapter.verified malformed", "no run", "nothing", None, "an alert is raised")


def test_the_event_is_lost_and_the_hourly_reconcile_promotes(
    stack: Stack, faults: FaultTable
) -> None:
    version = add(stack, 22, name=NAME)
    ended = stack.wait(stack.submit("reconcile/geography-hourly", names=[NAME]))
    assert ended.state is not None
    assert ended.state.message == f"promoted: {NAME}"
    assert champion(stack, NAME) == version
    faults.add("adapter.verified lost", "-", "registered", None, "the hourly reconcile promotes")


def test_the_event_comes_after_the_champion_has_changed(stack: Stack, faults: FaultTable) -> None:
    late, newer, before = add(stack, 23, name=NAME), add(stack, 24, name=NAME), promotions(stack)
    core.promote(stack.registry, NAME, newer, by="ann")
    announce(stack, late, NAME)
    said = ended_promotions(stack, before, 1)
    assert said == ["Completed: superseded"]
    assert champion(stack, NAME) == newer
    faults.add("adapter.verified late", said[0], "registered", None, "nothing is promoted")
