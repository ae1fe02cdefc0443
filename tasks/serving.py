"""What servers of a name do: waited for after a promotion, and told of where they do not follow."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient

from nested_core.registry import read_champion, read_champion_changes
from nested_core.registry.ledger import describe_author
from nested_core.registry.serving_status import (
    ServerStatus,
    ServingNews,
    await_serving,
    describe_server,
    find_servers_behind,
    read_await_serving,
    read_servers,
)
from nested_core.text.digest_format import shorten_digest
from tasks.deployed_registries import why_silent
from tasks.events import (
    NOT_FOLLOWED,
    SERVED,
    announce_changes,
    emit_adapter_event,
    send_adapter_event,
    send_missing_events,
)

TIME_TO_FOLLOW = timedelta(minutes=1)
TIME_HEARD_WITHIN = timedelta(hours=1)  # one that is silent is told of, one long gone is not


def await_servers(registry: Path, name: str, version: str) -> None:
    """Wait as long as `registry.await_serving`, recorded with the version, says; tell who is late.

    Nothing is waited for where it says nothing or there is no server.
    """
    seconds = read_await_serving(registry, name, version)
    if seconds is None:
        return
    servers = await_serving(registry, name, version, seconds=seconds)
    for server in servers:
        said = describe_server(server, version)
        get_run_logger().info("%s %s: %s", name, shorten_digest(version), said)
    if read_champion(registry, name) == version:
        tell_of_servers_behind(name, version, servers)
    else:
        announce_changes(registry, name)


def tell_of_servers_behind(name: str, version: str, servers: Sequence[ServerStatus]) -> list[str]:
    """Emit `adapter.not_followed` where servers do not serve a champion; a sentence for each."""
    behind = find_servers_behind(servers, version)
    if behind:
        emit_adapter_event(NOT_FOLLOWED, name, _describe_servers(version, behind))
    return [describe_server(server, version) for server in behind]


def send_serving_news(client: SyncPrefectClient, registry: Path, news: ServingNews) -> None:
    """Send what a server did; before it the changes that are not known yet, a rollback by it too.

    Nothing of a registry that no deployment names. Raises what the client raises.
    """
    if why_silent(client, registry, news.name) is not None:
        return
    send_missing_events(client, registry, news.name)
    happening = SERVED if news.server.version == news.champion else NOT_FOLLOWED
    payload = _describe_servers(news.champion, [news.server])
    send_adapter_event(client, happening, news.name, payload)


def _describe_servers(champion: str, servers: Sequence[ServerStatus]) -> dict[str, str]:
    """The payload of an event about servers of a champion."""
    sentences = "; ".join(describe_server(server, champion) for server in servers)
    return {"version": champion, "message": f"champion {shorten_digest(champion)}: {sentences}"}


def announce_servers(registry: Path, name: str) -> list[str]:
    """Tell which servers of a name do not follow its champion; a sentence for each."""
    changes = read_champion_changes(registry, name)
    champion = read_champion(registry, name)
    if champion is None or not changes:
        return []
    if datetime.now(UTC) - datetime.fromisoformat(changes[-1].time) <= TIME_TO_FOLLOW:
        return []
    servers = read_servers(registry, name, heard_within=TIME_HEARD_WITHIN)
    late = tell_of_servers_behind(name, champion, servers)
    return [f"{name}: {sentence}" for sentence in late]


def describe_rollback(registry: Path, name: str) -> str | None:
    """Who went back to the champion that stands now, and why; None where it was promoted."""
    changes = read_champion_changes(registry, name)
    if not changes or changes[-1].action != "rollback":
        return None
    last = changes[-1]
    author = describe_author(last.fields())
    return f"{name}: rolled back to {shorten_digest(str(last.version))} by {author}"
