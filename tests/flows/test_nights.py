"""A second night of one adapter does not train: which of two gives way."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.flow_engine import run_flow
from prefect.states import Completed, Pending, Running, Scheduled

from flows.finetune import finetune
from flows.flow_runs.nights import describe_other_night
from tests.example import example_settings

NOW = datetime(2026, 11, 22, 2, 0, tzinfo=UTC)
AT_WORK = "another run of this adapter is active"


def night(state: State[Any], hours: float, *, late: float = 0, by_schedule: bool = True) -> FlowRun:
    """A run that was due some hours after the night that is asked about, and began `late` hours."""
    due = NOW + timedelta(hours=hours)
    values = {"id": uuid4(), "flow_id": uuid4(), "state": state, "state_type": state.type}
    values |= {"expected_start_time": due, "auto_scheduled": by_schedule}
    if state.type == Running().type:
        values["start_time"] = due + timedelta(hours=late)
    return FlowRun.model_validate(values)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (night(Running(), -24), AT_WORK),
        (night(Running(), -24, by_schedule=False), AT_WORK),
        (night(Running(), 24), None),  # that one gives way
        (night(Scheduled(), 24), None),  # as that one will, if it begins before this one has ended
        (night(Pending(), 24), None),
        (night(Scheduled(), -24), None),
    ],
)
def test_of_two_nights_at_work_the_one_that_began_first_trains(other, expected) -> None:
    own = night(Running(), 0)
    said = describe_other_night(own, [own, other])
    assert (said is None) if expected is None else str(said).startswith(expected)
    assert said is None or str(other.id) in said


def test_of_two_nights_due_at_once_one_trains() -> None:
    first, second = night(Running(), 0), night(Running(), 0)
    said = [describe_other_night(own, [first, second]) for own in (first, second)]
    assert sum(each is None for each in said) == 1


@pytest.mark.parametrize("due", [-26, -2])
def test_of_two_late_nights_the_one_that_begins_second_gives_way_whichever_was_due_first(due):
    first, second = night(Running(), due, late=-due), night(Running(), -14, late=14.01)
    said = [describe_other_night(first, [first]), describe_other_night(second, [first, second])]
    assert (said[0], str(said[1]).startswith(AT_WORK)) == (None, True)


def begin(deployment: UUID, monkeypatch: pytest.MonkeyPatch) -> State[Any]:
    """What a worker's process does with a run, which the server calls one of a schedule."""
    read = SyncPrefectClient.read_flow_run

    def read_as_scheduled(client: SyncPrefectClient, run_id: UUID) -> FlowRun:
        run = read(client, run_id)
        run.auto_scheduled = True
        return run

    monkeypatch.setattr(SyncPrefectClient, "read_flow_run", read_as_scheduled)
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(client.create_flow_run_from_deployment(deployment).id)
        state: Any = run_flow(
            finetune, flow_run=run, parameters=run.parameters, return_type="state"
        )
    assert isinstance(state, State)
    return state


@pytest.mark.usefixtures("prefect_server")
def test_a_night_that_comes_while_one_is_at_work_ends_skipped_and_names_it(monkeypatch) -> None:
    config = example_settings(iters=2) | {"registry": {"path": "registry", "name": "twice"}}
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(
            client.create_flow(finetune),
            name=str(uuid4()),
            parameters={"config": config},
            enforce_parameter_schema=False,
        )
        at_work = client.create_flow_run_from_deployment(deployment)
        client.set_flow_run_state(at_work.id, Running(), force=True)
        state = begin(deployment, monkeypatch)
        client.set_flow_run_state(at_work.id, Completed(), force=True)
    assert (state.name, state.is_completed()) == ("Skipped: another night", True)
    assert str(state.message).startswith(f"{AT_WORK}, flow run ")
    assert str(at_work.id) in str(state.message)
