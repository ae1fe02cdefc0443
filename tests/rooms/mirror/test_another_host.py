"""A server on another host, which shares no folder with the author: a mirror alone reaches it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nested_core.registry import rollback
from nested_core.registry.mirroring import set_mirror
from nested_core.rooms.mirror.author import publish
from tests.production.hosts import THIS_MACHINE, Host, missing_for_hosts, two_hosts
from tests.rooms.mirror.s3_server import READER_KEY, READER_SECRET, FaultyProxy
from tests.rooms.serve.conftest import base, runs
from tests.rooms.serve.versions import NAME, promote_run
from tests.waiting import wait_until

__all__ = ["base", "runs"]
pytestmark = [pytest.mark.production, pytest.mark.timeout(600)]
PORT = 8080
ASK = (
    "import json, sys, urllib.request as u\n"
    "body = json.dumps({'messages': [{'role': 'user', 'content': 'Italy?'}], 'max_tokens': 4})\n"
    "there = 'http://127.0.0.1:8080'\n"
    "asked = u.Request(f'{there}/v1/chat/completions', body.encode(), method='POST')\n"
    "try:\n"
    "    told = json.load(u.urlopen(f'{there}/health'))\n"
    "    told['answered'] = u.urlopen(asked).headers['X-Adapter-Version']\n"
    "except OSError as error:\n"
    "    told = {'error': str(error)}\n"
    "print(json.dumps(told))\n"
)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Another host."""
    if missing := missing_for_hosts():
        pytest.skip(missing)
    with two_hosts(tmp_path) as pair:
        yield pair[0]


def test_a_server_on_another_host_follows_the_champion(
    runs, server, address, host: Host, tmp_path: Path
) -> None:
    registry = tmp_path / "registry"
    first = promote_run(runs[1], registry)
    set_mirror(registry / NAME, address)
    publish(registry / NAME, address)
    for folder in ("empty", "there"):
        (tmp_path / folder).mkdir()
    host.mount(tmp_path / "empty", registry)
    proxy = FaultyProxy(server, THIS_MACHINE)
    environment = {
        "AWS_ENDPOINT_URL": proxy.address,
        "AWS_ACCESS_KEY_ID": READER_KEY,
        "AWS_SECRET_ACCESS_KEY": READER_SECRET,
        "NESTED_TUNE_CACHE": str(tmp_path / "there" / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    serve = ["serve", "--registry", address, "--name", NAME, "--port", str(PORT)]
    words = ["env", *(f"{name}={value}" for name, value in environment.items()), sys.executable]
    log = tmp_path / "serve.log"
    process = host.start(tmp_path / "there", log, *words, "-m", "flows.cli", *serve)

    def answered() -> str:
        """The version that answers there, if health says the same."""
        told = json.loads(host.run(sys.executable, "-c", ASK))
        assert process.poll() is None, log.read_text()
        return str(told.get("answered")) if "error" not in told else ""

    try:
        assert list(registry.iterdir()) != []
        assert host.run("ls", "-A", str(registry)) == ""
        wait_until(lambda: answered() == first, "the champion answers there")
        second = promote_run(runs[2], registry)
        wait_until(lambda: answered() == second, "the promotion reaches it")
        proxy.choose = lambda: "reset"
        rollback(registry, NAME, by="ann")
        told = json.loads(host.run(sys.executable, "-c", ASK))
        assert told["answered"] == second
        wait_until(lambda: json.loads(host.run(sys.executable, "-c", ASK))["problems"] != [])
        proxy.choose = lambda: "none"
        wait_until(lambda: answered() == first, "the rollback reaches it")
    finally:
        process.terminate()
        process.wait(60)
        proxy.close()
