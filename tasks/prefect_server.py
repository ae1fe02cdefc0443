"""How a run asks Prefect's server of other runs and events; where that is away, the run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import PrefectException
from prefect.states import State

TAG = "nested-tune"  # of our deployments and their runs


@contextmanager
def tolerating_server_outage(what: str) -> Iterator[None]:
    """Log that `what` has to wait or be left out, where the server or the way to it fails.

    For what a page shows and a run does not rest on. A new client of Prefect's tries a connection
    that is refused only once, so that an outage of a second is an error here.
    """
    try:
        yield
    except (httpx.HTTPError, PrefectException, OSError) as error:
        get_run_logger().warning(
            "Prefect's server cannot be reached: %s (%s: %s). The run continues.",
            what,
            type(error).__name__,
            error,
        )


@contextmanager
def asking_server(what: str) -> Iterator[SyncPrefectClient]:
    """A client of the server, tolerating an outage: then the log says that `what` is left out."""
    with tolerating_server_outage(what), get_client(sync_client=True) as client:
        yield client


def flow_runs_in(states: Sequence[StateType], **conditions: dict[str, object]) -> FlowRunFilter:
    """The flow runs in these states, and with further conditions as Prefect's API writes them.

    Such as `tags={"all_": [TAG]}` or `deployment_id={"any_": [ID]}`.
    """
    return FlowRunFilter.model_validate({"state": {"type": {"any_": states}}} | conditions)


def set_run_state(client: SyncPrefectClient, run: FlowRun, state: State[None]) -> bool:
    """Set another run's state; where the server refuses it, the log says so, and this is False."""
    result = client.set_flow_run_state(run.id, state)
    if result.status != SetStateStatus.ACCEPT:
        get_run_logger().warning("%s stays as it is: %s", run.name, result.details)
    return result.status == SetStateStatus.ACCEPT


def read_events(client: SyncPrefectClient, limit: int, **wanted: object) -> list[dict[str, Any]]:
    """The events of a filter as Prefect's API writes it; the client has no method for it."""
    request = {"filter": wanted, "limit": limit}
    answer = client.request("POST", "/events/filter", json=request).raise_for_status()
    events: list[dict[str, object]] = answer.json()["events"]
    return events


def named_resource(identifier: str, name: str) -> dict[str, str]:
    """What an event is about."""
    return {"prefect.resource.id": identifier, "prefect.resource.name": name}


def related_resource(identifier: str, role: str) -> dict[str, str]:
    """What an event has to do with beside: its page shows the event, an automation may match it."""
    return {"prefect.resource.id": identifier, "prefect.resource.role": role}
