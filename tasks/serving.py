"""What servers of a name do: waited for after a promotion, and told of where they do not follow."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prefect import get_run_logger

from nested_core.registry import read_champion, read_champion_changes
from nested_core.registry.serving_status import (
    ServerStatus,
    await_serving,
    describe_server,
    find_servers_behind,
    read_servers,
)
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.text.digest_format import shorten_digest
from tasks.events import announce_changes, emit_adapter_event

TIME_TO_FOLLOW = timedelta(minutes=1)


def await_servers(registry: Path, name: str, version: str) -> None:
    """Wait as long as `registry.await_serving`, recorded with the version, says; tell who is late.

    Nothing is waited for where it says nothing or there is no server.
    """
    seconds, urls = _read_recorded_settings(registry, name, version)
    if seconds is None:
        return
    servers = await_serving(registry, name, version, seconds=seconds, urls=urls)
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
    sentences = [describe_server(server, version) for server in behind]
    if sentences:
        message = f"champion {shorten_digest(version)} is {'; '.join(sentences)}"
        emit_adapter_event("not_followed", name, {"version": version, "message": message})
    return sentences


def announce_servers(registry: Path, name: str) -> list[str]:
    """Tell which servers of a name do not follow its champion; a sentence for each."""
    changes = read_champion_changes(registry, name)
    champion = read_champion(registry, name)
    if champion is None or not changes:
        return []
    if datetime.now(UTC) - datetime.fromisoformat(changes[-1].time) <= TIME_TO_FOLLOW:
        return []
    _, urls = _read_recorded_settings(registry, name, champion)
    late = tell_of_servers_behind(name, champion, read_servers(registry, name, urls))
    return [f"{name}: {sentence}" for sentence in late]


def describe_rollback(registry: Path, name: str) -> str | None:
    """Who went back to the champion that stands now, and why; None where it was promoted."""
    changes = read_champion_changes(registry, name)
    if not changes or changes[-1].action != "rollback":
        return None
    last = changes[-1]
    reason = "" if last.reason is None else f": {last.reason}"
    return f"{name}: rolled back to {shorten_digest(str(last.version))} by {last.by}{reason}"


def _read_recorded_settings(
    registry: Path, name: str, version: str
) -> tuple[float | None, Sequence[str]]:
    """`registry.await_serving` and `serve.urls`, as they were recorded with a version."""
    recorded = read_provenance(version_folder(registry, name, version)).get("config") or {}
    section, serve = recorded.get("registry") or {}, recorded.get("serve") or {}
    return section.get("await_serving"), tuple(serve.get("urls") or ())
