"""A run that crashed goes on by itself, once: the automation, with its clock, on a real server."""

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
from prefect.events.schemas.automations import AutomationCore
from prefect.states import Crashed, Pending, Running, Scheduled

from flows.finetune import finetune
from flows.packaged_files import packaged_folder
from flows.rollback import rollback

# It waits for the server to see that nothing happens for a while.
pytestmark = [pytest.mark.usefixtures("prefect_server"), pytest.mark.reliability]
NAME = "nested-tune: resume what crashed"
SHORTEST = 10  # seconds; what Prefect allows


@contextmanager
def automation(client: SyncPrefectClient) -> Iterator[None]:
    """The automation as it is deployed, but with the shortest clock."""
    text = (packaged_folder("deployments") / "automations.yaml").read_text()
    (wanted,) = (a for a in yaml.safe_load(text)["automations"] if a["name"] == NAME)
    wanted["trigger"]["within"] = SHORTEST
    made = client.create_automation(AutomationCore.model_validate(wanted))
    time.sleep(1)  # the server's triggers hear of it by an event
    yield
    client.delete_automation(made)


def running_run(client: SyncPrefectClient, training: Flow[Any, Any], *, go: int) -> UUID:
    """A deployment's run in its first go, or in a later one after a crash of each before."""
    deployment = client.create_deployment(
        client.create_flow(training), name=str(uuid4()), enforce_parameter_schema=False
    )
    run_id = client.create_flow_run_from_deployment(deployment).id
    states: list[State[None]] = [Pending(), Running()]
    for _ in range(go - 1):
        states += [Crashed(), Scheduled(), Pending(), Running()]
    for state in states:
        client.set_flow_run_state(run_id, state)
    return run_id


def test_the_first_crash_of_a_fine_tune_is_resumed_and_no_other() -> None:
    with get_client(sync_client=True) as client:
        again = running_run(client, finetune, go=2)
        other = running_run(client, rollback, go=1)
        first = running_run(client, finetune, go=1)
        with automation(client):
            for run_id in (again, other, first):
                client.set_flow_run_state(run_id, Crashed())
            deadline = time.monotonic() + 90
            while client.read_flow_run(first).state_name == "Crashed":
                assert time.monotonic() < deadline
                time.sleep(0.5)
        run = client.read_flow_run(first)
        assert run.state is not None
        assert (run.state.type.value, run.state_name) == ("SCHEDULED", "Resumed")
        assert "press Retry" in str(run.state.message)
        assert [client.read_flow_run(id).state_name for id in (again, other)] == ["Crashed"] * 2
