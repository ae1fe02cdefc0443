"""Prefect's list of runs: looks that found nothing go, and what is to come has a name."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.states import State

from flows.reconcile import reconcile
from flows.rooms.nights import run_list
from flows.rooms.nights.run_list import tidy_run_list
from tasks.prefect_server import TAG


@pytest.fixture(scope="module")
def client(prefect_server: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as made:
        yield made


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has ended has ended long enough ago."""
    monkeypatch.setattr(run_list, "MIN_AGE", timedelta(0))


@flow(name="night")
def night() -> None:
    """Another flow than the hourly look; it is never run."""


def end_look(
    client: SyncPrefectClient,
    name: str = "Completed",
    kind: StateType = StateType.COMPLETED,
    *,
    of: Any = reconcile,
    tags: tuple[str, ...] = (TAG,),
) -> UUID:
    """A run of a flow that ended in a state."""
    run = client.create_flow_run(of, name="hourly", parameters={}, tags=list(tags))
    state: State[Any] = State(type=kind, name=name)
    client.set_flow_run_state(run.id, state, force=True)
    return run.id


def is_listed(client: SyncPrefectClient, run: UUID) -> bool:
    try:
        client.read_flow_run(run)
    except ObjectNotFound:
        return False
    return True


def test_a_look_whose_process_may_be_there_still_stays(client: SyncPrefectClient) -> None:
    just_ended = end_look(client)
    tidy_run_list()
    assert is_listed(client, just_ended)


@pytest.mark.usefixtures("later")
def test_a_look_that_found_nothing_is_removed_by_the_next_and_all_else_stays(client) -> None:
    found_nothing = [end_look(client) for _ in range(3)]
    stays = {
        "it promoted": end_look(client, "Promoted"),
        "it ended dead runs": end_look(client, "Ended dead runs"),
        "it found damage": end_look(client, "Damaged", StateType.FAILED),
        "it crashed": end_look(client, "Crashed", StateType.CRASHED),
        "it is no run of a deployment": end_look(client, tags=()),
        "it is a fine-tune": end_look(client, of=night),
    }
    tidy_run_list()
    assert [run for run in found_nothing if is_listed(client, run)] == []
    assert [why for why, run in stays.items() if not is_listed(client, run)] == []
    tidy_run_list()


@pytest.mark.usefixtures("later")
def test_two_reconciles_that_remove_the_same_rows_at_once_fail_nothing(client, monkeypatch) -> None:
    end_look(client)
    delete = SyncPrefectClient.delete_flow_run

    def delete_late(own: SyncPrefectClient, run: UUID) -> None:
        delete(own, run)  # as the other one does
        delete(own, run)

    monkeypatch.setattr(SyncPrefectClient, "delete_flow_run", delete_late)
    tidy_run_list()


def test_a_scheduled_run_is_named_by_its_deployment_and_the_time_it_is_due(client) -> None:
    schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 2 * * *"), active=True)
    name = f"capitals-{uuid4().hex[:6]}-nightly"
    deployment = client.create_deployment(
        client.create_flow(night), name=name, tags=[TAG], schedules=[schedule]
    )
    client.request("POST", f"/deployments/{deployment}/schedule", json={"min_runs": 2})
    by_hand = client.create_flow_run_from_deployment(deployment, name="by hand", tags=[TAG])
    tidy_run_list()
    runs = [
        run
        for run in client.read_flow_runs()
        if run.deployment_id == deployment and run.id != by_hand.id
    ]
    assert len(runs) >= 2
    for run in runs:
        due = run.expected_start_time
        assert due is not None
        assert run.name == f"{name}, {due.day} {due:%b} 02:00"
    assert client.read_flow_run(by_hand.id).name == "by hand"
    client.delete_deployment(deployment)
