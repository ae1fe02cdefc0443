"""Keeps Prefect's list of runs short and legible: of what happened, and by adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound

from tasks.prefect_server import TAG, asking_server, flow_runs_in

FOUND_NOTHING = (
    "Completed"  # the state of a look that found nothing; any other has an outcome's name
)
MIN_AGE = timedelta(minutes=1)  # of what is removed: its process is gone by then
MAX_RUNS = 200


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
