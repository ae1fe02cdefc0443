"""A fine-tune that crashed goes on by itself, once: by an automation of the server."""

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
from prefect.client.schemas.objects import State
from prefect.states import Crashed, Pending, Running

from flows.finetune import finetune
from flows.process.environment import packaged_folder
from flows.rollback import rollback
from flows.rooms.deploy.alerts import complete_automation
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_server")
NAME = "nested-tune: resume what crashed"
SHORTEST = 10  # seconds; what Prefect allows


@contextmanager
def automation(client: SyncPrefectClient) -> Iterator[None]:
    """The automation as it is deployed, but with the shortest clock."""
    text = (packaged_folder("deployments") / "automations.yaml").read_text()
    (wanted,) = (a for a in yaml.safe_load(text)["automations"] if a["name"] == NAME)
    wanted["trigger"]["within"] = SHORTEST
    made = client.create_automation(complete_automation(client, wanted, None))
    yield
    client.delete_automation(made)


def run_with_states(client: SyncPrefectClient, of: Flow[Any, Any], *states: State[None]) -> UUID:
    """A deployment's run that went through these states."""
    deployment = client.create_deployment(
        client.create_flow(of), name=str(uuid4()), enforce_parameter_schema=False
    )
    run = client.create_flow_run_from_deployment(deployment)
    for state in states:
        client.set_flow_run_state(run.id, state)
    return run.id


def resumed_run(client: SyncPrefectClient) -> UUID:
    """A fine-tune that crashed and was scheduled again.

    The server's triggers may not have heard of the automation when it crashes: then another does.
    """
    runs: list[UUID] = []

    def is_one_resumed() -> bool:
        runs.append(run_with_states(client, finetune, Pending(), Running(), Crashed()))
        until = time.monotonic() + 3 * SHORTEST
        while time.monotonic() < until:
            if any(client.read_flow_run(run).state_name == "Scheduled" for run in runs):
                return True
            time.sleep(0.5)
        return False

    wait_until(is_one_resumed, "a crashed run scheduled again")
    return next(run for run in runs if client.read_flow_run(run).state_name == "Scheduled")


@pytest.mark.reliability  # it waits for the server to see that nothing happens for a while
def test_a_fine_tune_is_scheduled_again_after_its_first_crash_and_after_no_other() -> None:
    with get_client(sync_client=True) as client, automation(client):
        first = resumed_run(client)
        others = [
            run_with_states(client, rollback, Pending(), Running(), Crashed()),
            run_with_states(client, finetune, Pending(), Crashed()),
        ]
        state = client.read_flow_run(first).state
        assert state is not None
        assert state.is_scheduled()
        assert state.state_details.scheduled_time is not None, "a worker would not find it"
        assert "press Retry" in str(state.message)
        resumed_run(client)  # whose clock began after theirs
        assert [client.read_flow_run(run).state_name for run in others] == ["Crashed"] * 2
        again: list[State[None]] = [Pending(), Running(), Crashed()]
        for then in again:
            client.set_flow_run_state(first, then)
        resumed_run(client)
        assert client.read_flow_run(first).state_name == "Crashed", "the second time"
