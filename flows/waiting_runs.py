"""What waiting fine-tunes wait for, in their states; a second night of one adapter is skipped.

A run that waits in a work pool has no process that could say anything. The run that it waits for
has one: while it works, it looks every few seconds at those that are due.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterId,
    FlowRunFilter,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.states import Completed, Scheduled

from flows.flow_run_labels import describe_night
from tasks.outcomes import Outcome

SECONDS_BETWEEN_LOOKS = 5.0
SLOT_WAIT = timedelta(seconds=30)  # how far ahead a run is put off that waits for a deployment
AWAITING_SLOT = "AwaitingConcurrencySlot"  # set by the server again and again
ACTIVE = (StateType.PENDING, StateType.RUNNING)


@contextmanager
def explaining_waiting_runs() -> Iterator[None]:
    """Look after the runs that wait behind this one while the block runs.

    Does nothing for a run that no deployment started: no worker has others waiting for it.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.deployment_id is None:
        yield
        return
    ended = threading.Event()
    arguments = (context.flow_run, ended)
    thread = threading.Thread(
        target=copy_context().run, args=(_look_until, *arguments), name="waiting runs", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=SECONDS_BETWEEN_LOOKS)  # before the pool has a place again
        try:
            with get_client(sync_client=True) as client:
                release_waiting_runs(client, context.flow_run.flow_id)
        except Exception as error:  # of the server or the way to it; this run has its outcome
            get_run_logger().warning("Waiting runs are still called so: %s", error)


def _look_until(own: FlowRun, ended: threading.Event) -> None:
    has_warned = False
    while not ended.wait(SECONDS_BETWEEN_LOOKS):
        try:
            with get_client(sync_client=True) as client:
                explain_waiting_runs(client, own)
        except Exception as error:  # of the server or the way to it; training goes on
            if not has_warned:
                get_run_logger().warning("Waiting runs cannot be looked at: %s", error)
            has_warned = True


def explain_waiting_runs(client: SyncPrefectClient, own: FlowRun) -> None:
    """Say in the state of each waiting run what it waits for, and skip second nights.

    A night is a run of a deployment with a schedule. Of several runs at work the oldest does this.
    """
    active = _read_runs(client, own.flow_id, ACTIVE)
    if not active or active[0].id != own.id:
        return
    nights: dict[UUID | None, bool] = {}

    def is_night(run: FlowRun) -> bool:
        """Whether the run's deployment has a schedule, as the server says once."""
        if run.deployment_id is None:
            return False
        if run.deployment_id not in nights:
            nights[run.deployment_id] = bool(client.read_deployment(run.deployment_id).schedules)
        return nights[run.deployment_id]

    waiting: list[FlowRun] = []
    for run in _read_runs(client, own.flow_id, (StateType.SCHEDULED,)):
        ahead = [other for other in (*active, *waiting) if is_night(run) and is_night(other)]
        same = [other for other in ahead if _adapter_of(other) == _adapter_of(run)]
        if same and run.run_count == 0:  # one that had begun and goes on is no second night
            _skip(client, run, same[0])
            continue
        waiting.append(run)
        _say_what_it_waits_for(client, run, active)


def release_waiting_runs(client: SyncPrefectClient, flow_id: UUID) -> None:
    """Call waiting runs Scheduled again: the server looks for late ones under that name alone."""
    for run in _read_runs(client, flow_id, (StateType.SCHEDULED,)):
        if run.state_name == Outcome.WAITING:
            due = run.next_scheduled_start_time or run.expected_start_time
            _set_state_unless_changed(client, run, Scheduled(scheduled_time=due))


def _read_runs(
    client: SyncPrefectClient, flow_id: UUID, types: Sequence[StateType]
) -> list[FlowRun]:
    """The flow's runs of these types that are due, in the order in which they were."""
    soon = FlowRunFilterNextScheduledStartTime.model_validate(
        {"before_": datetime.now(UTC) + SLOT_WAIT}
    )
    runs = client.read_flow_runs(
        flow_filter=FlowFilter(id=FlowFilterId(any_=[flow_id])),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types))),
            next_scheduled_start_time=soon if StateType.SCHEDULED in types else None,
        ),
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
    )
    return list(runs)


def _adapter_of(run: FlowRun) -> tuple[Any, Any]:
    registry = (run.parameters.get("config") or {}).get("registry") or {}
    return registry.get("path"), registry.get("name")


def _skip(client: SyncPrefectClient, run: FlowRun, other: FlowRun) -> None:
    """End a run in whose place another one of the same adapter is at work, or waits already."""
    is_at_work = other.state_type in ACTIVE
    what = "is at work" if is_at_work else "waits already"
    name = describe_night(other, other.parameters)
    message = f"skipped: another night of this adapter {what}, flow run {name!r} ({other.id})"
    _rename(client, run)
    _set_state_unless_changed(client, run, Completed(name=Outcome.SKIPPED, message=message))


def _say_what_it_waits_for(
    client: SyncPrefectClient, run: FlowRun, active: Sequence[FlowRun]
) -> None:
    """Put the reason into the state of a run for which its pool has no place."""
    if run.work_pool_name is None or run.state is None or run.state_name == AWAITING_SLOT:
        return
    limit = client.read_work_pool(run.work_pool_name).concurrency_limit
    holders = [other for other in active if other.work_pool_name == run.work_pool_name]
    if limit is None or len(holders) < limit:
        return
    names = ", ".join(repr(describe_night(other, other.parameters)) for other in holders)
    message = f"waits for {names}: the work pool {run.work_pool_name} runs {limit} at a time"
    if run.state.message == message:
        return
    _rename(client, run)
    due = run.next_scheduled_start_time or run.expected_start_time
    waiting: State[None] = Scheduled(name=Outcome.WAITING, message=message, scheduled_time=due)
    _set_state_unless_changed(client, run, waiting)


def _set_state_unless_changed(client: SyncPrefectClient, run: FlowRun, state: State[Any]) -> None:
    """Set the state of a run that is in the state that was read; a worker may have taken it."""
    current = client.read_flow_run(run.id).state
    if current is not None and run.state is not None and current.id == run.state.id:
        client.set_flow_run_state(run.id, state)


def _rename(client: SyncPrefectClient, run: FlowRun) -> None:
    """Give a run that has not begun the name that it will have."""
    name = describe_night(run, run.parameters)
    if run.name != name:
        client.update_flow_run(run.id, name=name)
