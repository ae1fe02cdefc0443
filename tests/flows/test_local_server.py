"""The server of a run at the command line: begun early, it serves only where it is asked to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from flows.process import local_server
from flows.process.local_server import HOST, LocalServer
from nested_core.errors import NestedTuneError

SHOW = """
from contextlib import suppress
from nested_core.errors import NestedTuneError
from flows.process.local_server import LocalServer, prefect_server
begun = []
start = LocalServer.__init__
LocalServer.__init__ = lambda self: (start(self), begun.append(self))[0]
with prefect_server() as wait:
    with suppress(NestedTuneError):  # there is no http://other
        wait()
    from prefect.settings import get_current_settings
    url = get_current_settings().api.url
print(url, [server._process.poll() is not None for server in begun])
"""

FREE = """
import threading
from flows.process import local_server
local_server.SECONDS_BETWEEN_COLLECTIONS = 0.01
local_server.collect_garbage_in_a_thread()
freed, threads = threading.Event(), []
class Cycle:
    def __init__(self):
        self.itself = self
    def __del__(self):
        threads.append(threading.current_thread())
        freed.set()
Cycle()
kept = [[] for _ in range(100_000)]  # Python's own collections begin by such numbers
assert freed.wait(100)
print(threads[0] is threading.main_thread())
"""


def show(folder: Path, **environment: str) -> list[str]:
    home = {"PREFECT_HOME": str(folder / "home")}
    given = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=given | home | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return done.stdout.split()


@pytest.mark.slow("starts a Prefect server of its own, with a new database")
def test_without_a_name_for_another_it_serves(tmp_path: Path) -> None:
    url, *ended = show(tmp_path)
    assert url.startswith("http://127.0.0.1:")
    assert ended == ["[False]"]
    assert (tmp_path / "home" / "prefect.db").exists()


def test_its_port_is_its_own_before_it_serves() -> None:
    """Else another run's server could have it by then, and would be taken for this one."""
    server = LocalServer()
    try:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((HOST, urlsplit(server.url).port))
    finally:
        server.stop()


def test_one_that_ended_and_one_that_is_too_slow_are_told_apart(monkeypatch) -> None:
    monkeypatch.setattr(local_server, "SECONDS_TO_START", 0.0)
    server = LocalServer()
    try:
        with pytest.raises(NestedTuneError, match="does not answer after 0 seconds. `nested-tune"):
            server.wait()
        server._process.wait(10)  # it was killed
        with pytest.raises(NestedTuneError, match="ended; its output is above. `nested-tune"):
            server.wait()
    finally:
        server.stop()


def test_no_garbage_is_freed_by_the_thread_of_the_event_loop() -> None:
    done = subprocess.run([sys.executable, "-c", FREE], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.slow("a process that imports all of Prefect")
def test_a_server_named_in_the_environment_is_used_and_none_begun(tmp_path: Path) -> None:
    assert show(tmp_path, PREFECT_API_URL="http://other:1/api") == ["http://other:1/api", "[]"]


@pytest.mark.slow("starts a Prefect server of its own, with a new database")
def test_a_server_named_in_a_profile_is_used_and_the_one_begun_ends_without_a_database(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "profiles.toml").write_text(
        'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://other:1/api"\n'
    )
    assert show(tmp_path) == ["http://other:1/api", "[True]"]
    assert not (home / "prefect.db").exists()
