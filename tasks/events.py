"""The events of an adapter: of runs, and one for each line of its history.

An event is a hint that can get lost or come twice: nothing is decided by one. Those of the history
have an id of their line, which holds the hash of the line before, and so of the first: no other
registry has the same line but a copy, whose old lines are told already. So whoever looks can send
what the server has not heard of: the run or the command that made the change, and the hourly
reconcile. New lines of a copy are not told (flows/rooms/deploy/deployed_registries.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid5

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient
from prefect.events import Event, emit_event

from nested_core import registry, seams
from nested_core.registry.ledger import Action
from tasks.prefect_server import asking_server, named_resource, read_events, related_resource

Happening = Literal["verified", "rejected", "unusual", "week"]
HAPPENING_BY_ACTION: dict[Action, str] = {
    "promote": "promoted",
    "rollback": "rolled_back",
    "moved": "moved",
    "declined": "declined",
    "forgotten": "forgotten",
    "restored": "restored",
    "policy": "policy_changed",
}
# How long ago a change may have been that the server is told of: it keeps events for a week, and
# what it has dropped is not to be told again.
MAX_AGE = timedelta(days=1)
# Until when a change is news, which alerts are sent for: two hourly looks.
NEWS_AGE = timedelta(hours=2)
NEWS_LABEL = {"nested-tune.news": "yes"}
MAX_EVENTS = 50  # that the server answers at once
PAYLOAD_FIELDS = ("version", "previous", "by", "reason", "before", "after")
NAMESPACE = UUID("6b1d2c52-6a0e-4d56-9d0b-6f1d6d2f8f3a")


@dataclass(frozen=True)
class ServerPages:
    """What a room has on Prefect's server of an adapter, by its registry and its name.

    publish: publishes the page of the champion.
    publish_if_changed: publishes it if the server's is of another champion; returns whether it did.
    had_champion: returns whether the server has a page of a champion.
    why_silent: returns why the server gets no events of an adapter, in a sentence; None if it does.
    """

    publish: Callable[[Path, str], None] = lambda *_: None
    publish_if_changed: Callable[[Path, str], bool] = lambda *_: False
    had_champion: Callable[[Path, str], bool] = lambda *_: False
    why_silent: Callable[[SyncPrefectClient, Path, str], str | None] = lambda *_: None


def emit_adapter_event(
    happening: Happening, name: str, payload: dict[str, Any], occurred: datetime | None = None
) -> None:
    """Emit `adapter.HAPPENING` on the resource `adapter.NAME`, as of now if not `occurred`."""
    emit_event(f"adapter.{happening}", adapter_resource(name), occurred, payload=payload)


def announce_changes(path: Path, name: str) -> None:
    """Tell the server of the changes of an adapter that it has not heard of; in a flow run."""
    with asking_server(f"what was changed of {name} is sent by the next reconcile") as client:
        if (reason := send_missing_events(client, path, name)) is not None:
            get_run_logger().warning("%s", reason)


def send_missing_events(client: SyncPrefectClient, path: Path, name: str) -> str | None:
    """Send an event for each change of the last day that the server has none of.

    Returns why none is sent where no deployment names this registry.
    """
    since = datetime.now(UTC) - MAX_AGE
    lines = [
        line
        for line in registry.history(path, name)
        if line["action"] in HAPPENING_BY_ACTION
        and not line.get("unfinished")
        and datetime.fromisoformat(line["time"]) > since
    ]
    events = [_event_of_line(name, line) for line in lines[-MAX_EVENTS:]]
    if not events:
        return None
    told = read_events(client, MAX_EVENTS, id={"id": [str(event.id) for event in events]})
    known = {UUID(event["id"]) for event in told}
    missing = [event.model_dump(mode="json") for event in events if event.id not in known]
    if not missing:
        return None
    for pages in seams.load_all(ServerPages):
        if (reason := pages.why_silent(client, path, name)) is not None:
            return reason
    client.request("POST", "/events", json=missing).raise_for_status()
    return None


def adapter_resource(name: str) -> dict[str, str]:
    """The resource that all events of an adapter are about."""
    return named_resource(f"adapter.{name}", name)


def _event_of_line(name: str, line: dict[str, Any]) -> Event:
    """The event of a line of the history: what was changed, by whom, and when."""
    is_news = datetime.now(UTC) - datetime.fromisoformat(line["time"]) <= NEWS_AGE
    flow_run = line.get("flow_run")
    related = related_resource(f"prefect.flow-run.{flow_run}", "flow-run")
    return Event.model_validate(
        {
            "id": uuid5(NAMESPACE, f"{name} {json.dumps(line, sort_keys=True)}"),
            "occurred": line["time"],
            "event": f"adapter.{HAPPENING_BY_ACTION[line['action']]}",
            "resource": adapter_resource(name) | (NEWS_LABEL if is_news else {}),
            "related": [] if flow_run is None else [related],
            "payload": {field: line[field] for field in PAYLOAD_FIELDS if field in line},
        }
    )
