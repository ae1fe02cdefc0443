"""What servers of a name say in their files, and how a promotion waits for them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from nested_core.config.sections import RegistrySection
from nested_core.registry import promote, rollback
from nested_core.registry.serving_status import (
    ServerStatus,
    ServingRecord,
    await_configured,
    await_serving,
    describe_server,
    read_servers,
    write_serving_record,
)
from tests.core.registry.test_registry_modes import NOBODY

NAME = "capitals"
SINCE = "2026-11-22T21:04:10+00:00"


def write_record(registry: Path, version: str, *, age: float = 0.0, **more: Any) -> None:
    """The file of a server that this process would be."""
    heartbeat = (datetime.now(UTC) - timedelta(seconds=age)).isoformat()
    record = ServingRecord("http://127.0.0.1:1", version, SINCE, heartbeat, **more)
    write_serving_record(registry / NAME, record)


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


def test_what_a_file_says_is_shortened(three: tuple[str, str, str], registry: Path) -> None:
    write_record(registry, three[0], refused={"reason": "r" * 5000})
    (server,) = read_servers(registry, NAME)
    assert len(server.problem or "") < 600


WRITE_AS_ANOTHER_USER = """
import os, sys
from pathlib import Path
from tests.core.registry.test_serving_status import NAME, write_record
registry, user = Path(sys.argv[1]), int(sys.argv[2])
if os.getuid() == 0:
    os.setgid(user)
    os.setuid(user)
assert not os.access(registry / NAME, os.W_OK)
write_record(registry, "ab" * 32)
"""


def test_a_server_that_may_write_nothing_but_that_folder_is_seen() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        registry = Path(place)
        registry.chmod(0o755)
        (registry / NAME / "serving").mkdir(parents=True)
        (registry / NAME / "serving").chmod(0o1777)
        (registry / NAME).chmod(0o555)
        command = [sys.executable, "-c", WRITE_AS_ANOTHER_USER, place, str(NOBODY)]
        subprocess.run(command, cwd=Path(__file__).parents[3], check=True)
        (server,) = read_servers(registry, NAME)
        (registry / NAME).chmod(0o755)
    assert server.version == "ab" * 32


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
    assert await_configured(section, three[1]) == []
    waiting = section.model_copy(update={"await_serving": 0.1})
    assert await_configured(waiting, three[1]) == [f"serving since {SINCE}, at http://127.0.0.1:1"]
    assert await_configured(waiting, three[0])[0].startswith("not served at")


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
