"""What servers of a name say: by their files, by /health, and waited for after a promotion."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.sections import RegistrySection
from nested_core.registry import promote, register, rollback
from nested_core.registry.serving_status import (
    ServerStatus,
    ServingRecord,
    await_configured,
    await_serving,
    describe_server,
    is_served,
    read_servers,
    write_serving_record,
)
from tests.core.registry.conftest import write_run

NAME = "capitals"
SINCE = "2026-11-22T21:04:10+00:00"


def write_record(registry: Path, version: str, *, age: float = 0.0, **more: Any) -> None:
    """The file of a server that this process would be."""
    heartbeat = (datetime.now(UTC) - timedelta(seconds=age)).isoformat()
    record = ServingRecord("http://127.0.0.1:1", version, SINCE, heartbeat, **more)
    write_serving_record(registry / NAME, record)


class _Health(BaseHTTPRequestHandler):
    documents: dict[str, Any]

    def do_GET(self) -> None:
        content = self.documents.get(self.path)
        self.send_response(302 if content == "elsewhere" else 200 if content else 404)
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def health() -> Iterator[tuple[str, dict[str, Any]]]:
    """The address of a server that answers with the documents by path."""
    documents: dict[str, Any] = {}
    server = HTTPServer(("127.0.0.1", 0), type("_Own", (_Health,), {"documents": documents}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", documents
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_is_known_by_its_file_while_its_heartbeat_is_new(
    three: tuple[str, str, str], registry: Path
) -> None:
    refused = {"version": three[1], "reason": "canary: it differs"}
    write_record(registry, three[0], refused=refused)
    (server,) = read_servers(registry, NAME)
    assert server == ServerStatus("http://127.0.0.1:1", three[0], SINCE, "canary: it differs")
    assert describe_server(server, three[1]) == (
        f"not served at http://127.0.0.1:1: {three[0][:12]} there; canary: it differs"
    )
    assert describe_server(server, three[0]) == f"serving since {SINCE}, at http://127.0.0.1:1"
    write_record(registry, three[0], age=61)
    assert read_servers(registry, NAME) == []


def test_a_name_has_servers_by_their_files_or_recorded_addresses(
    three: tuple[str, str, str], registry: Path, tmp_path: Path
) -> None:
    assert not is_served(registry, NAME)
    provenance = {"config": {"serve": {"urls": ["http://127.0.0.1:1"]}}}
    recorded = register(write_run(tmp_path / "run-9", 9), registry, NAME, provenance)
    promote(registry, NAME, recorded, by="ann")
    assert is_served(registry, NAME)
    promote(registry, NAME, three[0], by="ann")
    assert not is_served(registry, NAME)
    write_record(registry, three[0], age=10**6)
    assert is_served(registry, NAME)


def test_servers_of_a_damaged_champion_are_looked_at(
    three: tuple[str, str, str], registry: Path
) -> None:
    link = registry / NAME / "champion"
    link.unlink()
    link.symlink_to("elsewhere")
    assert is_served(registry, NAME)


def test_what_a_file_or_health_says_is_shortened(
    three: tuple[str, str, str],
    registry: Path,
    health: tuple[str, dict[str, Any]],
) -> None:
    url, documents = health
    said = {"version": three[0], "since": "s" * 5000, "refused": {"reason": "r" * 5000}}
    documents["/health"] = {"names": {NAME: said}}
    write_record(registry, three[0], refused={"reason": "r" * 5000})
    for server in read_servers(registry, NAME, [url]):
        assert len(server.problem or "") < 600
        assert len(server.since or "") < 200


def test_a_server_that_writes_no_file_is_asked(
    three: tuple[str, str, str], registry: Path, health: tuple[str, dict[str, Any]]
) -> None:
    url, documents = health
    status = {"version": three[1], "since": SINCE, "refused": None}
    documents["/health"] = {"names": {NAME: status}}
    assert read_servers(registry, NAME, [f"{url}/"]) == [ServerStatus(url, three[1], SINCE)]
    answers: tuple[Any, ...] = ({"names": {}}, [], {"names": {NAME: 1}}, "elsewhere", None)
    for wrong in answers:
        documents["/health"] = wrong
        (server,) = read_servers(registry, NAME, [url])
        assert server.version is None
        assert "nothing is known there; it did not say" in describe_server(server, three[1])


def test_a_promotion_waits_until_the_server_follows_and_no_longer_than_it_may(
    three: tuple[str, str, str], registry: Path
) -> None:
    first, second, _ = three
    assert await_serving(registry, NAME, second, seconds=60) == []  # there is no server
    write_record(registry, first)
    began = time.monotonic()
    (server,) = await_serving(registry, NAME, second, seconds=0.6)
    assert server.version == first
    assert time.monotonic() - began >= 0.6
    timer = threading.Timer(0.3, write_record, [registry, second])
    timer.start()
    (server,) = await_serving(registry, NAME, second, seconds=60)
    timer.join()
    assert (server.version, server.since) == (second, SINCE)


def test_a_promotion_waits_as_it_is_configured_and_says_what_came_of_it(
    three: tuple[str, str, str], registry: Path
) -> None:
    section = RegistrySection(path=str(registry), name=NAME)
    write_record(registry, three[1])
    assert await_configured(section, (), three[1]) == []
    waiting = section.model_copy(update={"await_serving": 0.1})
    assert await_configured(waiting, (), three[1]) == [
        f"serving since {SINCE}, at http://127.0.0.1:1"
    ]
    assert await_configured(waiting, (), three[0])[0].startswith("not served at")


def test_nobody_waits_for_a_version_that_was_rolled_back(
    three: tuple[str, str, str], registry: Path, add: Callable[[int], str]
) -> None:
    promote(registry, NAME, three[2], by="ann")
    write_record(registry, three[1])
    timer = threading.Timer(0.3, lambda: rollback(registry, NAME, by="a server"))
    timer.start()
    began = time.monotonic()
    await_serving(registry, NAME, three[2], seconds=60)
    timer.join()
    assert time.monotonic() - began < 30
