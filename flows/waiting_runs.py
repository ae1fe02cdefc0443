"""What waiting fine-tunes wait for, in their states; a second night of one adapter is skipped.

A run that waits in a work pool has no process that could say anything. The run that it waits for
has one: while it works, it looks every few seconds at those that are due, the first of the line
alone: each costs requests, and in a queue of hundreds a run would spend its time on them.
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
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.states import Completed, Scheduled

from flows.flow_run_labels import format_flow_run_name
from tasks.outcomes import Outcome

SECONDS_BETWEEN_LOOKS = 5.0
CONCURRENCY_SLOT_DELAY = timedelta(seconds=30)  # of a run that waits for its deployment
MAX_WAITING_RUNS_READ = 20  # how many waiting runs are looked at
ACTIVE_STATES = (StateType.PENDING, StateType.RUNNING)


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
        target=copy_context().run,
        args=(_explain_waiting_runs_until, *arguments),
        name="waiting runs",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=SECONDS_BETWEEN_LOOKS)  # before the pool has a place again
        try:
            with get_client(sync_client=True) as client:
                rename_waiting_to_scheduled(client, context.flow_run)
        except Exception as error:  # of the server or the way to it; this run has its outcome
            get_run_logger().warning("Waiting runs are still called so: %s", error)


def _explain_waiting_runs_until(own: FlowRun, ended: threading.Event) -> None:
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
    active = _read_active_runs(client, own.flow_id)
    at_work = [run.id for run in active if run.state_type == StateType.RUNNING]
    if at_work[:1] != [own.id]:
        return
    limits = _RunLimits(client)
    waiting: list[FlowRun] = []
    for run in _read_due_runs(client, own.flow_id, active):
        ahead = [other for other in (*active, *waiting) if limits.are_scheduled(run, other)]
        same = [
            other for other in ahead if _registry_and_name_of(other) == _registry_and_name_of(run)
        ]
        if same and run.run_count == 0:  # one that had begun and goes on is no second night
            _skip_run(client, run, same[0])
            continue
        waiting.append(run)
        if message := limits.describe_wait(run, active):
            _set_waiting(client, run, message)


def rename_waiting_to_scheduled(client: SyncPrefectClient, own: FlowRun) -> None:
    """Call waiting runs Scheduled again: the server looks for late ones under that name alone.

    In a pool where another run is at work that run goes on looking after them.
    """
    active = [other for other in _read_active_runs(client, own.flow_id) if other.id != own.id]
    busy = {other.work_pool_name for other in active}
    named_waiting = FlowRunFilterState(name=FlowRunFilterStateName(any_=[Outcome.WAITING]))
    for run in _read_runs(client, own.flow_id, FlowRunFilter(state=named_waiting)):
        if run.state_type == StateType.SCHEDULED and run.work_pool_name not in busy:
            due = run.next_scheduled_start_time or run.expected_start_time
            _set_state_unless_changed(client, run, Scheduled(scheduled_time=due))


def _read_active_runs(client: SyncPrefectClient, flow_id: UUID) -> list[FlowRun]:
    """The flow's runs that are pending or at work, in the order in which they were due."""
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(ACTIVE_STATES)))
    return _read_runs(client, flow_id, FlowRunFilter(state=state))


def _read_due_runs(
    client: SyncPrefectClient, flow_id: UUID, active: Sequence[FlowRun]
) -> list[FlowRun]:
    """The flow's first runs that are due in the work pools of the active ones.

    In a pool where no run is at work none waits behind another, however long its line is.
    """
    pools = {run.work_pool_name for run in active if run.work_pool_name is not None}
    due = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        next_scheduled_start_time=FlowRunFilterNextScheduledStartTime.model_validate(
            {"before_": datetime.now(UTC) + CONCURRENCY_SLOT_DELAY}
        ),
    )
    in_pools = WorkPoolFilter(name=WorkPoolFilterName(any_=sorted(pools)))
    return _read_runs(client, flow_id, due, in_pools)


def _read_runs(
    client: SyncPrefectClient,
    flow_id: UUID,
    which: FlowRunFilter,
    pools: WorkPoolFilter | None = None,
) -> list[FlowRun]:
    runs = client.read_flow_runs(
        flow_filter=FlowFilter(id=FlowFilterId(any_=[flow_id])),
        flow_run_filter=which,
        work_pool_filter=pools,
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        limit=MAX_WAITING_RUNS_READ,
    )
    return list(runs)


def _registry_and_name_of(run: FlowRun) -> tuple[Any, Any]:
    registry = (run.parameters.get("config") or {}).get("registry") or {}
    return registry.get("path"), registry.get("name")


def _skip_run(client: SyncPrefectClient, run: FlowRun, other: FlowRun) -> None:
    """End a run in whose place another one of the same adapter is at work, or waits already."""
    is_at_work = other.state_type in ACTIVE_STATES
    what = "is at work" if is_at_work else "waits already"
    name = format_flow_run_name(other, other.parameters)
    message = f"skipped: another night of this adapter {what}, flow run {name!r} ({other.id})"
    _rename_run(client, run)
    _set_state_unless_changed(client, run, Completed(name=Outcome.SKIPPED, message=message))


class _RunLimits:
    """The places that pools and deployments have for runs, each asked of the server once."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self._client = client
        self._deployments: dict[UUID, DeploymentResponse] = {}
        self._pool_limits: dict[str, int | None] = {}

    def are_scheduled(self, *runs: FlowRun) -> bool:
        """Whether the deployments of all of these runs have a schedule."""
        deployments = [self._deployment_of(run) for run in runs]
        return all(each is not None and each.schedules for each in deployments)

    def describe_wait(self, run: FlowRun, active: Sequence[FlowRun]) -> str | None:
        """A sentence where the run's pool or deployment has no place; None where both have one.

        Where only the deployment has none, the server calls the run AwaitingConcurrencySlot each
        time that a worker has asked for it, every 30 seconds, and says no more.
        """
        pool, limit = run.work_pool_name, self._pool_limit_of(run)
        in_pool = [other for other in active if other.work_pool_name == pool]
        if limit is not None and len(in_pool) >= limit:
            return _describe_limit(f"the work pool {pool}", limit, in_pool)
        deployment = self._deployment_of(run)
        if deployment is None or deployment.global_concurrency_limit is None:
            return None
        limit = deployment.global_concurrency_limit.limit
        of_deployment = [other for other in active if other.deployment_id == run.deployment_id]
        if len(of_deployment) < limit:
            return None
        return _describe_limit(f"the deployment {deployment.name}", limit, of_deployment)

    def _deployment_of(self, run: FlowRun) -> DeploymentResponse | None:
        if run.deployment_id is None:
            return None
        if run.deployment_id not in self._deployments:
            self._deployments[run.deployment_id] = self._client.read_deployment(run.deployment_id)
        return self._deployments[run.deployment_id]

    def _pool_limit_of(self, run: FlowRun) -> int | None:
        if run.work_pool_name is None:
            return None
        if run.work_pool_name not in self._pool_limits:
            pool = self._client.read_work_pool(run.work_pool_name)
            self._pool_limits[run.work_pool_name] = pool.concurrency_limit
        return self._pool_limits[run.work_pool_name]


def _describe_limit(what: str, limit: int, holders: Sequence[FlowRun]) -> str:
    names = ", ".join(repr(format_flow_run_name(other, other.parameters)) for other in holders)
    return f"waits for {names}: {what} runs {limit} at a time"


def _set_waiting(client: SyncPrefectClient, run: FlowRun, message: str) -> None:
    """Put what a run waits for into its state, unless it is there."""
    if run.state is None or run.state.message == message:
        return
    _rename_run(client, run)
    due = run.next_scheduled_start_time or run.expected_start_time
    waiting: State[None] = Scheduled(name=Outcome.WAITING, message=message, scheduled_time=due)
    _set_state_unless_changed(client, run, waiting)


def _set_state_unless_changed(client: SyncPrefectClient, run: FlowRun, state: State[Any]) -> None:
    """Set the state of a run that is in the state that was read; a worker may have taken it."""
    current = client.read_flow_run(run.id).state
    if current is not None and run.state is not None and current.id == run.state.id:
        client.set_flow_run_state(run.id, state)


def _rename_run(client: SyncPrefectClient, run: FlowRun) -> None:
    """Give a run that has not begun the name that it will have."""
    name = format_flow_run_name(run, run.parameters)
    if run.name != name:
        client.update_flow_run(run.id, name=name)
