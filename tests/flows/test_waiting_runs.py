"""Runs that wait behind another: their states say for what, and a second night is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch
from uuid import UUID, uuid4

import pytest
from prefect import flow, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.states import Completed, Pending, Running

from flows import waiting_runs
from flows.finetune import finetune
from flows.waiting_runs import explain_waiting_runs, rename_waiting_to_scheduled
from tasks.device_waiting import end_waiting, show_waiting

pytestmark = pytest.mark.usefixtures("prefect_server")
DUE = datetime.now(UTC)


class Queue:
    """A work pool, with a nightly and a manual deployment of an adapter, of one run at a time."""

    def __init__(self, client: SyncPrefectClient, pool_limit: int = 1) -> None:
        self.client = client
        self.pool = f"pool-{uuid4()}"
        self.adapter = f"adapter-{uuid4().hex[:8]}"
        client.create_work_pool(WorkPoolCreate(name=self.pool, concurrency_limit=pool_limit))
        flow_id = client.create_flow(finetune)
        every_night = DeploymentScheduleCreate(
            schedule=CronSchedule(cron="0 2 * * *"), active=False
        )
        config = {"config": {"registry": {"path": "registry", "name": self.adapter}}}
        self.deployments = {
            name: client.create_deployment(
                flow_id,
                name=str(uuid4()),
                work_pool_name=self.pool,
                schedules=schedules,
                parameters=config,
                concurrency_limit=1,
                enforce_parameter_schema=False,
            )
            for name, schedules in (("nightly", [every_night]), ("manual", []))
        }

    def add(self, name: str, *states: Any) -> UUID:
        run = self.client.create_flow_run_from_deployment(self.deployments[name])
        for state in states:
            self.client.set_flow_run_state(run.id, state)
        return run.id

    def read(self, run_id: UUID) -> FlowRun:
        return self.client.read_flow_run(run_id)

    def look(self, run_id: UUID) -> None:
        explain_waiting_runs(self.client, self.read(run_id))

    def said(self, run_id: UUID) -> tuple[str | None, str]:
        run = self.read(run_id)
        assert run.state is not None
        return run.state_name, str(run.state.message)


@pytest.fixture
def queue() -> Iterator[Queue]:
    with get_client(sync_client=True) as client:
        made = Queue(client)
        yield made
        for run in client.read_flow_runs():  # another test's runs are not at work any more
            if run.work_pool_name == made.pool:
                client.set_flow_run_state(run.id, Completed(), force=True)


def test_a_run_that_waits_for_the_pool_says_for_which_run(queue: Queue) -> None:
    at_work = queue.add("manual", Pending(), Running())
    waiting = queue.add("manual")
    due = queue.read(waiting).next_scheduled_start_time
    queue.look(at_work)
    night = f"{queue.adapter}, {DUE.day} {DUE:%b}"
    message = f"waits for '{night}': the work pool {queue.pool} runs 1 at a time"
    assert queue.said(waiting) == ("Waiting", message)
    run = queue.read(waiting)
    assert (run.name, run.state_type) == (night, StateType.SCHEDULED)
    assert run.next_scheduled_start_time == due
    before = len(queue.client.read_flow_run_states(waiting))
    queue.look(at_work)  # again: nothing new, no row more
    assert len(queue.client.read_flow_run_states(waiting)) == before
    other = queue.add("manual", Pending(), Running())
    rename_waiting_to_scheduled(queue.client, queue.read(other))  # the other one looks after it
    assert queue.said(waiting)[0] == "Waiting"
    queue.client.set_flow_run_state(other, Completed(), force=True)
    rename_waiting_to_scheduled(
        queue.client, queue.read(at_work)
    )  # it may be late now: that is told
    assert queue.said(waiting)[0] == "Scheduled"
    assert queue.read(waiting).next_scheduled_start_time == due


def test_a_run_for_which_the_pool_has_a_place_and_its_deployment_none_says_so(
    queue: Queue,
) -> None:
    wide = Queue(queue.client, pool_limit=2)
    at_work = wide.add("manual", Pending(), Running())
    waiting = wide.add("manual")
    queue.client.set_flow_run_state(waiting, Pending())  # as a worker asks
    assert wide.said(waiting) == ("AwaitingConcurrencySlot", "None")
    due = wide.read(waiting).next_scheduled_start_time
    wide.look(at_work)
    name, message = wide.said(waiting)
    assert name == "Waiting"
    assert message.startswith(f"waits for '{wide.adapter}, ")
    deployment = queue.client.read_deployment(wide.deployments["manual"]).name
    assert message.endswith(f": the deployment {deployment} runs 1 at a time")
    assert wide.read(waiting).next_scheduled_start_time == due
    queue.client.set_flow_run_state(at_work, Completed(), force=True)
    queue.client.set_flow_run_state(waiting, Completed(), force=True)


def test_a_run_stuck_in_pending_keeps_no_other_from_looking_after_those_that_wait(
    queue: Queue,
) -> None:
    wide = Queue(queue.client, pool_limit=2)
    stuck = wide.add("manual", Pending())
    at_work = wide.add("nightly", Pending(), Running())
    waiting = wide.add("manual")
    wide.look(at_work)
    assert wide.said(waiting)[0] == "Waiting"
    for run_id in (stuck, at_work, waiting):
        queue.client.set_flow_run_state(run_id, Completed(), force=True)


def test_a_second_night_does_not_queue_up_behind_one_that_waits(queue: Queue) -> None:
    at_work = queue.add("manual", Pending(), Running())
    first, second = queue.add("nightly"), queue.add("nightly")
    queue.look(at_work)
    assert queue.said(first)[0] == "Waiting"
    name, message = queue.said(second)
    assert name == "Skipped"
    assert queue.read(second).state_type == StateType.COMPLETED
    assert message.startswith("skipped: another night of this adapter waits already")
    assert str(first) in message


def test_a_night_that_comes_while_one_is_at_work_is_skipped_and_names_it(queue: Queue) -> None:
    at_work, second = queue.add("nightly", Pending(), Running()), queue.add("nightly")
    queue.look(at_work)
    name, message = queue.said(second)
    assert name == "Skipped"
    assert "is at work" in message
    assert str(at_work) in message


def test_nights_of_other_adapters_and_runs_by_hand_wait_for_their_turn(queue: Queue) -> None:
    other = Queue(queue.client)
    at_work = queue.add("nightly", Pending(), Running())
    waiting = [queue.add("manual"), other.add("nightly")]
    queue.look(at_work)
    assert queue.said(waiting[0])[0] == "Waiting"
    assert queue.said(waiting[1])[0] == "Scheduled"  # its own pool is free
    other.client.set_flow_run_state(waiting[1], Completed(), force=True)


def test_a_run_that_a_worker_takes_meanwhile_is_not_put_back(queue: Queue) -> None:
    at_work = queue.add("manual", Pending(), Running())
    waiting = queue.add("manual")
    queue.look(at_work)
    before = queue.read(waiting)
    queue.client.set_flow_run_state(waiting, Pending(), force=True)
    with (
        patch.object(waiting_runs, "_read_active_runs", return_value=[]),
        patch.object(waiting_runs, "_read_runs", return_value=[before]),
    ):
        rename_waiting_to_scheduled(queue.client, queue.read(at_work))
    assert queue.said(waiting)[0] == "Pending"


def test_of_a_long_queue_the_first_runs_alone_are_told_what_they_wait_for(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting_runs, "MAX_WAITING_RUNS_READ", 3)
    other = Queue(queue.client)
    idle = [other.add("manual") for _ in range(4)]  # nothing is at work in that pool
    at_work = queue.add("manual", Pending(), Running())
    queued = [queue.add("manual") for _ in range(6)]
    queue.look(at_work)
    states = [queue.said(run_id)[0] for run_id in queued]
    assert states == ["Waiting"] * 3 + ["Scheduled"] * 3
    queue.client.set_flow_run_state(at_work, Completed(), force=True)
    rename_waiting_to_scheduled(queue.client, queue.read(at_work))
    assert {queue.said(run_id)[0] for run_id in queued} == {"Scheduled"}
    for run_id in idle:
        queue.client.set_flow_run_state(run_id, Completed(), force=True)


def test_a_pool_at_work_does_not_keep_another_pools_runs_waiting(queue: Queue) -> None:
    other = Queue(queue.client)
    at_work, elsewhere = (each.add("manual", Pending(), Running()) for each in (queue, other))
    waiting, waiting_elsewhere = queue.add("manual"), other.add("manual")
    queue.look(at_work)
    states = [queue.said(run_id)[0] for run_id in (waiting, waiting_elsewhere)]
    assert states == ["Waiting", "Waiting"]
    queue.client.set_flow_run_state(elsewhere, Completed(), force=True)
    rename_waiting_to_scheduled(queue.client, queue.read(elsewhere))
    states = [queue.said(run_id)[0] for run_id in (waiting, waiting_elsewhere)]
    assert states == ["Waiting", "Scheduled"]
    queue.client.set_flow_run_state(waiting_elsewhere, Completed(), force=True)


def test_a_run_that_is_due_later_is_left_alone(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, later = queue.add("nightly", Pending(), Running()), queue.add("nightly")
    monkeypatch.setattr(waiting_runs, "CONCURRENCY_SLOT_DELAY", timedelta(hours=-1))
    queue.look(at_work)
    assert queue.said(later)[0] == "Scheduled"


def test_a_run_that_waits_for_the_device_says_so_until_it_has_it() -> None:
    message = "device gpu-0 is in use by process 123: waiting until it is free"

    def own_state() -> tuple[str | None, str | None]:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(str(runtime.flow_run.id))).state
        assert state is not None
        assert state.type == StateType.RUNNING
        return state.name, state.message

    @flow
    def training() -> list[tuple[str | None, str | None]]:
        end_waiting()  # it has not waited
        before = own_state()
        show_waiting(message)
        while_waiting = own_state()
        end_waiting()
        return [before, while_waiting, own_state()]

    assert training() == [("Running", None), ("Waiting", message), ("Running", None)]
