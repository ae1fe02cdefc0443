"""A cancel or suspension of which no worker hears: the run asks, and keeps what it has done."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextvars import copy_context
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.states import Cancelled, Cancelling, State, Suspended

from flows.finetune import FinetuneParameters, finetune
from nested_core.records.plan import read_plan
from nested_core.records.result import read_result
from nested_core.seams import is_there, load
from nested_core.storage.checkpoint import latest_checkpoint
from nested_core.storage.run_directory import RunDirectory, find_run_of
from tasks.artifact_client import artifact_key, find_newest_artifact
from tests.example import example_settings
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("prefect_server")
STEPS = 1000


def cancel_once(has_begun: Callable[[], bool], tag: str, state: State[None]) -> None:
    """What a person's Cancel does on the server, or the server itself after five minutes of it."""
    wait_until(has_begun)
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]))
        (flow_run,) = client.read_flow_runs(flow_run_filter=wanted)
        client.set_flow_run_state(flow_run.id, state)


def run_cancelled_once(
    has_begun: Callable[[], bool], given: FinetuneParameters, tag: str, state: State[None]
) -> State[Any]:
    """The end of a flow run that is cancelled on the server while it is at work."""
    person = threading.Thread(target=copy_context().run, args=(cancel_once, has_begun, tag, state))
    person.start()
    ended = finetune(given, return_state=True)
    person.join()
    return ended


@pytest.mark.slow("trains until the server says stop")
@pytest.mark.parametrize("state", [Cancelling(), Cancelled()], ids=lambda state: str(state.name))
def test_a_training_that_is_cancelled_on_the_server_alone_ends_with_a_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    new_name: str,
    state: State[None],
) -> None:
    monkeypatch.setattr(logging.getLogger("prefect.flow_runs"), "handlers", [caplog.handler])
    monkeypatch.setattr("flows.flow_runs.cancel_watch.SECONDS_BETWEEN_LOOKS", 0.2)
    run = RunDirectory(tmp_path / "run")
    settings = example_settings(
        iters=STEPS,
        save_every=2,
        steps_per_report=1,
        steps_per_eval=STEPS,
        registry={"path": str(tmp_path / "registry"), "name": new_name, "promote": "never"},
    )
    given = FinetuneParameters.model_validate(settings | {"run_dir": str(run.path)})

    def has_checkpoint() -> bool:
        return run.checkpoints.exists() and latest_checkpoint(run.checkpoints) is not None

    ended = run_cancelled_once(has_checkpoint, given, new_name, state)
    assert ended.is_cancelled()
    checkpoint = latest_checkpoint(run.checkpoints)
    assert checkpoint is not None
    assert checkpoint.step < STEPS
    assert not run.result.exists()
    said = str(ended.message)
    stopped_at = f"Training was stopped at step {checkpoint.step} of {STEPS}."
    assert said.startswith(f"resumable by a retry of this flow run: {stopped_at}")
    assert f"Cancelled, {said} What is done is in {run.path}." in caplog.text
    with get_client(sync_client=True) as client:  # the page keeps what a worker's message replaces
        page = find_newest_artifact(client, artifact_key(new_name, "night"))
    assert page is not None
    assert stopped_at in str(page.data)


@pytest.mark.slow("trains a run, twice")
def test_a_suspended_training_ends_with_a_checkpoint_and_goes_on_once_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NESTED_TUNE_ROOTS", os.pathsep.join((str(tmp_path), str(ROOT))))
    monkeypatch.setenv("NESTED_TUNE_REGISTRIES", "registry")
    monkeypatch.setattr("flows.flow_runs.cancel_watch.SECONDS_BETWEEN_LOOKS", 0.2)
    settings = example_settings(
        iters=600,
        save_every=2,
        steps_per_eval=600,
        registry={"path": "registry", "name": new_name, "promote": "never"},
    )
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(
            client.create_flow(finetune),
            name=new_name,
            parameters={"config": settings},
            enforce_parameter_schema=False,
        )
        flow_run = client.create_flow_run_from_deployment(deployment)

        def run_as_a_worker_does() -> Any:
            begun = client.read_flow_run(flow_run.id)
            given = begun.parameters
            return run_flow(finetune, flow_run=begun, parameters=given, return_type="state")

        def has_checkpoint() -> bool:
            run = find_run_of(flow_run.id)
            return run is not None and latest_checkpoint(run.checkpoints) is not None

        suspending: tuple[Any, ...] = (has_checkpoint, new_name, Suspended())
        person = threading.Thread(target=copy_context().run, args=(cancel_once, *suspending))
        person.start()
        with pytest.raises(Pause):
            run_as_a_worker_does()
        person.join()
        run = find_run_of(flow_run.id)
        assert run is not None
        suspended_at = latest_checkpoint(run.checkpoints)
        assert suspended_at is not None
        assert suspended_at.step < 600
        suspended = client.read_flow_run(flow_run.id)
        assert suspended.state_name == "Suspended"
        if is_there("nights"):
            describe_other_night = load("flows.rooms.nights.other_night:describe_other_night")
            night = client.create_flow_run_from_deployment(deployment)
            night = night.model_copy(update={"start_time": datetime.now(UTC)})
            said = describe_other_night(night, [suspended])
            assert f"suspended, flow run {suspended.name!r}" in str(said)
        client.resume_flow_run(flow_run.id)
        assert run_as_a_worker_does().is_completed()
    plan = read_plan(run.plan)
    assert plan is not None
    assert plan.resumed_at == (suspended_at.step,)
    assert read_result(run.result).step == 600


@pytest.mark.slow("another flow run")
# A signal may come as os.scandir returns: what it returned is closed by the collector then.
@pytest.mark.filterwarnings("ignore:unclosed scandir iterator:ResourceWarning")
def test_a_run_that_is_cancelled_before_it_trains_ends_there_and_can_be_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_name: str
) -> None:
    monkeypatch.setattr("flows.flow_runs.cancel_watch.SECONDS_BETWEEN_LOOKS", 0.2)
    run = RunDirectory(tmp_path / "run")
    settings = example_settings(
        nested={"strategy": "parameter_importance", "probe_batches": 100_000},  # for minutes
        registry={"path": str(tmp_path / "registry"), "name": new_name, "promote": "never"},
    )
    given = FinetuneParameters.model_validate(settings | {"run_dir": str(run.path)})
    ended = run_cancelled_once(run.dataset.exists, given, new_name, Cancelling())
    assert ended.is_cancelled()
    assert "resumable by a retry of this flow run: Stopped outside of training" in str(
        ended.message
    )
    assert not run.tiers.exists()
