"""Looks after Prefect's list of runs: those whose process is gone, forgotten ones, and its length.

Each run of ours sends a heartbeat every 30 seconds. One of which nothing was heard for 300 is
looked at for another 300 before it is ended: a run that lives is heard in that time, however long
the server or its network was away before, and whatever the clocks of the two machines say.

A server that stops within seconds of a run's crash forgets to resume it: such runs are resumed too.
The list is kept short and legible: of what happened, and by adapter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed, Scheduled, State

from tasks.prefect_server import TAG, asking_server, flow_runs_in, read_events, set_run_state

SECONDS_OF_SILENCE = 300.0  # as in automations.yaml
SECONDS_BETWEEN_LOOKS = 30.0
RESUME_AUTOMATION = "nested-tune: resume what crashed"  # it comes 20 seconds after a crash
SECONDS_FOR_THE_AUTOMATION = 300.0
OLDEST_CRASH = timedelta(hours=12)  # the next night trains what an older run left
ACTIVE_TYPES = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
DEAD_MESSAGE = (
    "No heartbeat for {minutes:.0f} minutes: its process is gone. Retry the run to go on from its "
    "last checkpoint."
)
RESUME_MESSAGE = (
    "Crashed, and goes on from its last checkpoint: the server had forgotten to resume it. After a "
    "second crash press Retry."
)
FOUND_NOTHING = "Completed"  # the state of such a look; any other has an outcome's name
MIN_AGE = timedelta(minutes=1)  # of what is removed: its process is gone by then
MAX_RUNS = 200


@dataclass(frozen=True)
class LifeSign:
    """The last that was heard of an active run: its state, and its latest heartbeat."""

    run: FlowRun
    state: UUID
    heartbeat: str | None
    at: datetime

    def is_same(self, other: LifeSign) -> bool:
        """Return whether nothing was heard between the two."""
        return (self.state, self.heartbeat) == (other.state, other.heartbeat)


def end_dead_runs(silence: float = SECONDS_OF_SILENCE) -> list[str]:
    """End runs whose state is active but whose process is gone; return their names.

    A run is taken for dead if it sends no heartbeat for `silence` seconds while this waits. Returns
    at once if each active run sent one within the last `silence` seconds. If the server cannot be
    reached, nothing is ended: the next look, an hour later, tries again.
    """
    ended: list[str] = []
    with asking_server("dead runs are not looked for") as client:
        bound = datetime.now(UTC) - timedelta(seconds=silence)
        suspects = [sign for sign in _read_life_signs(client) if sign.at < bound]
        until = time.monotonic() + silence
        while suspects and time.monotonic() < until:
            time.sleep(min(SECONDS_BETWEEN_LOOKS, silence / 4))
            new = {sign.run.id: sign for sign in _read_life_signs(client)}
            suspects = [s for s in suspects if s.run.id in new and s.is_same(new[s.run.id])]
        ended += [sign.run.name for sign in suspects if _end_run(client, sign)]
    return ended


def resume_forgotten_runs(after: float = SECONDS_FOR_THE_AUTOMATION) -> list[str]:
    """Resume fine-tunes that crashed and that the automation did not resume; return their names.

    Only a run's first crash counts, if it was between `after` seconds and OLDEST_CRASH ago. Nothing
    is resumed while the automation is paused or not deployed.
    """
    resumed: list[str] = []
    with asking_server("crashed runs are not resumed") as client:
        if not any(each.enabled for each in client.read_automations_by_name(RESUME_AUTOMATION)):
            return []
        fine_tunes = FlowFilter(name=FlowFilterName(any_=["finetune"]))
        crashed = flow_runs_in((StateType.CRASHED,), tags={"all_": [TAG]})
        latest = datetime.now(UTC) - timedelta(seconds=after)
        for run in client.read_flow_runs(flow_filter=fine_tunes, flow_run_filter=crashed):
            if run.state is None or run.run_count != 1 or run.deployment_id is None:
                continue
            is_forgotten = latest - OLDEST_CRASH < run.state.timestamp <= latest
            if is_forgotten and set_run_state(client, run, Scheduled(message=RESUME_MESSAGE)):
                get_run_logger().warning("%s: %s", run.name, RESUME_MESSAGE)
                resumed.append(run.name)
    return resumed


def _read_life_signs(client: SyncPrefectClient) -> list[LifeSign]:
    """Return the active runs with our tag but this one, each with the last that was heard of it."""
    active = flow_runs_in(ACTIVE_TYPES, tags={"all_": [TAG]})
    own = str(runtime.flow_run.id)
    runs = [run for run in client.read_flow_runs(flow_run_filter=active) if str(run.id) != own]
    return [_read_life_sign(client, run, run.state) for run in runs if run.state is not None]


def _read_life_sign(client: SyncPrefectClient, run: FlowRun, state: State[Any]) -> LifeSign:
    """Return a run's newest sign of life: its last heartbeat or change of state."""
    events = read_events(
        client,
        1,
        event={"name": ["prefect.flow-run.heartbeat"]},
        resource={"id": [f"prefect.flow-run.{run.id}"]},
        order="DESC",
    )
    if not events:
        return LifeSign(run, state.id, None, state.timestamp)
    at = datetime.fromisoformat(events[0]["occurred"])
    return LifeSign(run, state.id, events[0]["id"], max(at, state.timestamp))


def _end_run(client: SyncPrefectClient, sign: LifeSign) -> bool:
    """Call a dead run Crashed, or Cancelled where that was asked for; False if it is refused."""
    message = DEAD_MESSAGE.format(minutes=(datetime.now(UTC) - sign.at).total_seconds() / 60)
    is_cancelling = sign.run.state_type == StateType.CANCELLING
    state: State[None] = Cancelled(message=message) if is_cancelling else Crashed(message=message)
    is_ended = set_run_state(client, sign.run, state)
    if is_ended:
        get_run_logger().warning("%s: %s", sign.run.name, message)
    return is_ended


def tidy_run_list() -> None:
    """Delete earlier runs of `reconcile` that found nothing, and name the scheduled runs.

    The latest run of `reconcile` stays. A scheduled run has a random name from the server: it gets
    the name of its deployment and the time at which it is due. All adapters of the server count.
    """
    with asking_server("the list of runs is tidied up by the next reconcile") as client:
        for run in _iterate_looks_without_findings(client):
            with suppress(ObjectNotFound):  # the reconcile of another adapter has just deleted it
                client.delete_flow_run(run.id)
        names: dict[UUID, str] = {}
        waiting = flow_runs_in([StateType.SCHEDULED], tags={"all_": [TAG]})
        for run in client.read_flow_runs(flow_run_filter=waiting, limit=MAX_RUNS):
            if run.deployment_id is None or not run.auto_scheduled or run.run_count:
                continue
            if run.deployment_id not in names:
                names[run.deployment_id] = client.read_deployment(run.deployment_id).name
            name = name_of_scheduled_run(run, names[run.deployment_id])
            if run.name != name:
                client.update_flow_run(run.id, name=name)


def name_of_scheduled_run(run: FlowRun, deployment: str) -> str:
    """Return a name such as `capitals-nightly, 26 Nov 02:00` (UTC)."""
    due = (run.expected_start_time or datetime.now(UTC)).astimezone(UTC)
    return f"{deployment}, {due.day} {due:%b %H:%M}"


def _iterate_looks_without_findings(client: SyncPrefectClient) -> Iterator[FlowRun]:
    """Yield the runs of `reconcile` that have ended and found nothing."""
    wanted = FlowRunFilter.model_validate(
        {
            "state": {"type": {"any_": [StateType.COMPLETED]}, "name": {"any_": [FOUND_NOTHING]}},
            "end_time": {"before_": datetime.now(UTC) - MIN_AGE},
            "tags": {"all_": [TAG]},
        }
    )
    flows = FlowFilter.model_validate({"name": {"any_": ["reconcile"]}})
    yield from client.read_flow_runs(flow_filter=flows, flow_run_filter=wanted, limit=MAX_RUNS)
