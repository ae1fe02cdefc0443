"""A run that crashed goes on by itself, once: the flow that counts, and the automation's clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
import yaml
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed, Crashed, Pending, Running, Scheduled

from flows.deploy import complete_automation
from flows.finetune import finetune
from flows.packaged_files import packaged_folder
from flows.resume import ResumeParameters, resume
from flows.rollback import rollback
from tasks.outcomes import Outcome

pytestmark = pytest.mark.usefixtures("prefect_server")
NAME = "nested-tune: resume what crashed"
SHORTEST = 10  # seconds; what Prefect allows
WAITED: tuple[State[None], ...] = (
    Pending(),
    Running(),
    Running(name=Outcome.WAITING),
    Running(),
)  # for the device


@contextmanager
def automation(client: SyncPrefectClient) -> Iterator[UUID]:
    """The automation as it is deployed, but with the shortest clock; gives its deployment."""
    deployment = client.create_deployment(
        client.create_flow(resume), name="auto", enforce_parameter_schema=False
    )
    text = (packaged_folder("deployments") / "automations.yaml").read_text()
    (wanted,) = (a for a in yaml.safe_load(text)["automations"] if a["name"] == NAME)
    wanted["trigger"]["within"] = SHORTEST
    made = client.create_automation(complete_automation(client, wanted, None))
    time.sleep(1)  # the server's triggers hear of it by an event
    yield deployment
    client.delete_automation(made)


def run_with_states(
    client: SyncPrefectClient, of: Flow[Any, Any], *states: State[None]
) -> tuple[UUID, str]:
    """The id and the name of a deployment's run that went through these states."""
    deployment = client.create_deployment(
        client.create_flow(of), name=str(uuid4()), enforce_parameter_schema=False
    )
    run = client.create_flow_run_from_deployment(deployment)
    for state in states:
        client.set_flow_run_state(run.id, state)
    return run.id, run.name


def resumed(run: tuple[UUID, str]) -> tuple[str, str, str | None]:
    """The flow's own state and what it says of a run, and the state that the run is in then."""
    state = resume(ResumeParameters(flow_run=run[0], name=run[1]), return_state=True)
    message = str(state.message).removeprefix(f"{run[1]} ")
    with get_client(sync_client=True) as client:
        return str(state.name), message, client.read_flow_run(run[0]).state_name


@pytest.mark.parametrize(
    "before",
    [
        pytest.param((Pending(), Running()), id="in its first go"),
        pytest.param(WAITED, id="after it has waited for the device"),
        pytest.param((Pending(),), id="before its flow began"),
        pytest.param(
            (*WAITED, Running(), Scheduled(), Pending(), Running()), id="after a Retry by a person"
        ),
    ],
)
def test_the_first_crash_of_a_run_is_resumed_and_the_second_is_not(
    before: tuple[State[None], ...],
) -> None:
    with get_client(sync_client=True) as client:
        run = run_with_states(client, finetune, *before, Crashed())
        assert resumed(run) == ("Resumed", "goes on from its last checkpoint", "Resumed")
        state = client.read_flow_run(run[0]).state
        assert state is not None
        assert state.is_scheduled()
        assert "press Retry" in str(state.message)
        second_go: list[State[None]] = [Pending(), Crashed()]
        for then in second_go:
            client.set_flow_run_state(run[0], then)
    message = "crashed again: it stays Crashed until a Retry"
    assert resumed(run) == ("Not resumed", message, "Crashed")


def test_a_run_that_goes_on_already_or_has_ended_is_left_alone() -> None:
    with get_client(sync_client=True) as client:
        retried = run_with_states(client, finetune, Pending(), Running(), Crashed(), Scheduled())
        ended = run_with_states(client, finetune, Pending(), Running(), Completed(name="Promoted"))
    assert resumed(retried) == ("Completed", "is Scheduled by now", "Scheduled")
    assert resumed(ended) == ("Completed", "is Promoted by now", "Promoted")


@pytest.mark.reliability  # it waits for the server to see that nothing happens for a while
def test_the_automation_starts_the_flow_for_a_fine_tune_that_crashed_and_for_no_other() -> None:
    with get_client(sync_client=True) as client:
        other = run_with_states(client, rollback, Pending(), Running())
        waited = run_with_states(client, finetune, *WAITED)
        first = run_with_states(client, finetune, Pending(), Running())
        with automation(client) as deployment:
            for run_id, _ in (other, waited, first):
                client.set_flow_run_state(run_id, Crashed())
            wanted = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
            started: list[FlowRun] = []
            deadline = time.monotonic() + 90
            while len(started) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.5)
                started = client.read_flow_runs(flow_run_filter=wanted)
        given = [ResumeParameters.model_validate(run.parameters["config"]) for run in started]
    assert {(each.flow_run, each.name) for each in given} == {waited, first}
