"""What the servers of a name serve, by their files below it or by their own `/health`."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from nested_core.config.sections import RegistrySection
from nested_core.errors import DamagedError, shorten
from nested_core.registry.queries import read_champion
from nested_core.registry.serving_file import (
    MAX_HEARTBEAT_AGE,
    ServingRecord,
    read_serving_records,
)
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.text.digest_format import shorten_digest

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_ANSWER = 5.0
MAX_HEALTH_BYTES = 1024 * 1024
MAX_REASON_LENGTH = 500


@dataclass(frozen=True)
class ServerStatus:
    """What one server says of a name.

    address: http://HOST:PORT.
    version: what it serves; None where it was asked and gave no answer.
    since: when it began to serve that, UTC, ISO 8601.
    problem: why it does not serve another version, or gave no answer; None for no problem.
    """

    address: str
    version: str | None
    since: str | None
    problem: str | None = None


@dataclass(frozen=True)
class ServingNews:
    """What a server did with a champion of a name: it serves it, or says why it does not."""

    name: str
    champion: str
    server: ServerStatus


def read_serving_settings(
    registry: Path, name: str, version: str
) -> tuple[float | None, Sequence[str]]:
    """`registry.await_serving` and `serve.urls`, as they were recorded with a version."""
    recorded = read_provenance(version_folder(registry, name, version)).get("config") or {}
    section, serve = recorded.get("registry") or {}, recorded.get("serve") or {}
    return section.get("await_serving"), tuple(serve.get("urls") or ())


def is_served(registry: Path, name: str) -> bool:
    """Whether a name has servers to be looked at: files of theirs, or recorded addresses.

    A damaged champion is to be looked at as well.
    """
    if read_serving_records(registry / name):
        return True
    try:
        champion = read_champion(registry, name)
        return champion is not None and bool(read_serving_settings(registry, name, champion)[1])
    except DamagedError:
        return True


def read_servers(
    registry: Path,
    name: str,
    urls: Sequence[str] = (),
    *,
    heard_within: timedelta = MAX_HEARTBEAT_AGE,
) -> list[ServerStatus]:
    """The servers of a name: those whose file is at most so old, and those at `urls`.

    A server that has a file is not asked again. One that has not written it for a minute has that
    as its problem.
    """
    now = datetime.now(UTC)
    records = read_serving_records(registry / name).values()
    servers = [_status_of(r, now) for r in records if r.age(now) <= heard_within]
    known = {server.address for server in servers}
    asked = [url.rstrip("/") for url in urls]
    return servers + [_ask_server(url, name) for url in asked if url not in known]


def _status_of(record: ServingRecord, now: datetime) -> ServerStatus:
    """What a server's file says."""
    status = _shortened(record.address, record.version, record.since, record.refused)
    if record.is_alive(now):
        return status
    return replace(status, problem=f"nothing was heard of it since {shorten(record.heartbeat)}")


def _shortened(
    address: str, version: str, since: str, refused: dict[str, str] | None
) -> ServerStatus:
    reason = (refused or {}).get("reason")
    problem = None if reason is None else shorten(reason, MAX_REASON_LENGTH)
    return ServerStatus(shorten(address, 200), shorten(version, 64), shorten(since), problem)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A server that sends elsewhere is not followed."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: the answer stands as it is."""


def _ask_server(url: str, name: str) -> ServerStatus:
    """What a server's `/health` says of a name."""
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=SECONDS_TO_ANSWER) as answer:
            status = json.loads(answer.read(MAX_HEALTH_BYTES))["names"][name]
        return _shortened(url, status["version"], status["since"], status["refused"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"it did not say what it serves for {name} ({type(error).__name__})"
        return ServerStatus(url, None, None, reason)


def await_serving(
    registry: Path, name: str, version: str, *, seconds: float, urls: Sequence[str] = ()
) -> list[ServerStatus]:
    """Wait until every server of a name serves a version, at most so many seconds.

    Returns what they say then; at once where there is no server, or the champion is another again.
    """
    deadline = time.monotonic() + seconds
    while True:
        servers = read_servers(registry, name, urls)
        is_over = time.monotonic() >= deadline or read_champion(registry, name) != version
        if is_over or not find_servers_behind(servers, version):
            return servers
        time.sleep(SECONDS_BETWEEN_LOOKS)


def await_configured(section: RegistrySection, urls: Sequence[str], version: str) -> list[str]:
    """Wait as `registry.await_serving` says; a sentence for each server, none without the key."""
    if section.await_serving is None or section.path is None or section.name is None:
        return []
    registry = Path(section.path)
    servers = await_serving(
        registry, section.name, version, seconds=section.await_serving, urls=urls
    )
    return [describe_server(server, version) for server in servers]


def find_servers_behind(servers: Sequence[ServerStatus], version: str) -> list[ServerStatus]:
    """The servers that do not serve a version."""
    return [server for server in servers if server.version != version]


def describe_server(server: ServerStatus, version: str) -> str:
    """A sentence: since when a server serves a version, or that it does not and why."""
    if server.version == version:
        return f"serving since {server.since}, at {server.address}"
    what = "nothing is known" if server.version is None else shorten_digest(server.version)
    said = f"not served at {server.address}: {what} there"
    return said if server.problem is None else f"{said}; {server.problem}"
