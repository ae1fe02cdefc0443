"""Faults injected into what runs: nothing wrong is promoted, and no training is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.flow_runs import resume_flow_run

from nested_core import registry as core
from nested_core.records.metrics import read_metrics
from nested_core.storage.checkpoint import latest_checkpoint
from nested_core.storage.run_directory import RunDirectory
from tests.production.faults import FaultTable
from tests.production.stack import DEAD_WITHIN, Stack, wait_for
from tests.production.test_production import add, champion

pytestmark = [pytest.mark.production, pytest.mark.timeout(1200)]

NAME = "asked"  # the adapter that a person is asked about
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
        assert message.startswith("begun 2 times, last from step-"), message
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

    def is_unpromoted(self) -> bool:
        folder = self.stack.registry / self.name
        return not folder.exists() or core.read_champion(self.stack.registry, self.name) is None


def test_kill_9_of_the_flow_process(stack: Stack, faults: FaultTable) -> None:
    training = Training(stack, "killed-flow").until(20)
    held = f"checkpoint of step {training.step()}"
    os.kill(stack.flow_process(training.id), signal.SIGKILL)
    message = training.end_promoted_once()
    assert "begun 2 times, last from step-" in message, message
    faults.add("kill -9 of the flow process", "Completed", held, 0, "begun again, promoted once")


def test_kill_9_of_the_parent_of_the_flow_process(stack: Stack, faults: FaultTable) -> None:
    training = Training(stack, "killed-parent").until(20)
    began = time.monotonic()
    os.kill(stack.flow_parent(training.id), signal.SIGKILL)
    state, seconds = training.final_state(began)
    assert state == "Crashed"
    assert seconds < SLOT_IS_FREE_WITHIN
    assert training.is_unpromoted()
    held = f"checkpoint of step {training.step()}"
    training.go_on_by_itself()
    then = "goes on by itself, promoted once"
    faults.add("kill -9 of its parent", state, held, seconds, then)


def test_cancelled_while_it_trains(stack: Stack, faults: FaultTable) -> None:
    cancel_and_retry(Training(stack, "cancelled").until(20), faults, "cancel while training")


def cancel_and_retry(training: Training, faults: FaultTable, row: str) -> None:
    """Cancel a training: it writes a checkpoint first, and goes on from there when retried."""
    began = time.monotonic()
    training.stack.cancel(training.id)
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


def test_kill_9_of_worker_and_flow_process_and_of_what_goes_on_by_itself(stack, faults) -> None:
    training = Training(stack, "killed-both", iters=2 * STEPS).until(20)
    began = time.monotonic()
    stack.workers["mlx-gpu"].kill()
    for process in stack.processes_of(training.id):
        os.kill(process, signal.SIGKILL)
    stack.workers["mlx-gpu"].wait()
    stack.start_worker("mlx-gpu")
    state, seconds = training.final_state(began, DEAD_WITHIN)
    assert state == "Crashed"
    assert "No heartbeat for 300 seconds" in str(stack.flow_run(training.id).state)
    begun_at = training.step()
    held = f"checkpoint of step {begun_at}"
    then = "goes on by itself"
    faults.add("kill -9 of worker and flow process", state, held, seconds, then)

    training.until(begun_at + 20)
    began = time.monotonic()
    os.kill(stack.flow_parent(training.id), signal.SIGKILL)
    state, seconds = training.final_state(began)
    assert state == "Crashed"
    time.sleep(60)
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
    # It may end before it has told what became of its run: then the missing heartbeat does.
    state, seconds = training.final_state(began, DEAD_WITHIN)
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


def test_the_disk_is_full_when_a_checkpoint_is_written(stack, faults, small_disk) -> None:
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


def test_a_deploy_between_a_crash_and_its_resumption_changes_nothing(stack, faults) -> None:
    training = Training(stack, "deployed-between").until(20)
    os.kill(stack.flow_parent(training.id), signal.SIGKILL)
    training.final_state()
    deployed = stack.nested_tune("deploy", "-c", "small.yaml", "--json")
    assert deployed.returncode == 0, deployed.stderr
    assert "automation 'nested-tune: resume what crashed': there already" in deployed.stdout
    training.go_on_by_itself()
    then = "goes on by itself, promoted once"
    faults.add("`deploy` between a crash and its resumption", "Crashed", "-", None, then)


def questions(stack: Stack, version: str) -> list[FlowRun]:
    """The runs of promote/auto for a version."""
    return [
        r for r in stack.runs_of("promote/auto") if r.parameters["config"]["version"] == version
    ]


def test_a_person_is_asked_once_by_the_run_and_by_reconcile_whatever_events_come(
    stack: Stack, faults: FaultTable
) -> None:
    section = {"path": "registry", "name": NAME, "promote": "approve"}
    ended = stack.wait(stack.submit("finetune/geography-manual", registry=section))
    assert ended.state is not None
    assert ended.state_name != "Failed", ended.state.message
    (version,) = core.list_versions(stack.registry, NAME)
    (question,) = questions(stack, version)
    stack.wait(question.id, "Waits for approval")
    for _ in range(2):  # the event, again, in every form
        announce(stack, version, NAME)
        announce(stack, "not a version", NAME)
    stack.wait(stack.submit("reconcile/geography-hourly", names=[NAME]))
    assert [run.id for run in questions(stack, version)] == [question.id]
    # A version whose run was killed before it asked
    lost = add(stack, 31, "approve", name=NAME)
    stack.wait(stack.submit("reconcile/geography-hourly", names=[NAME]))
    stack.wait(stack.submit("reconcile/geography-hourly", names=[NAME]))
    (asked,) = questions(stack, lost)
    stack.wait(asked.id, "Waits for approval")
    with stack.connected():
        resume_flow_run(asked.id, run_input={"approve": True, "by": "ann"})
    assert stack.wait(asked.id).state_name == "Approved"
    assert champion(stack, NAME) == lost
    then = "one question, whoever asks; no event decides"
    what = "approval: event lost, sent twice, malformed"
    faults.add(what, "Waits for approval", "registered", None, then)


def announce(stack: Stack, version: str, name: str) -> None:
    """The event `adapter.verified`, as anybody who reaches the server can send it."""
    resource = {"prefect.resource.id": f"adapter.{name}", "prefect.resource.name": name}
    resource |= {"nested-tune.promotion": "open"}
    event = {"event": "adapter.verified", "resource": resource, "id": str(uuid4())}
    event |= {"payload": {"version": version, "registry": str(stack.registry), "run_dir": "x"}}
    event |= {"occurred": datetime.now(UTC).isoformat()}
    with stack.connected() as client:
        client.request("POST", "/events", json=[event]).raise_for_status()
