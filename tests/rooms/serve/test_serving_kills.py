"""kill -9 of a server while it starts, answers and swaps leaves nothing wrong."""

from __future__ import annotations

import http.client
import json
import random
import signal
import subprocess
import threading
import time
from contextlib import suppress

import pytest

from nested_core.registry import read_champion
from tests.example import MODEL
from tests.flows.conftest import PROGRAM
from tests.registry_care import audit
from tests.rooms.serve.test_command import health, serve_process
from tests.rooms.serve.versions import (
    NAME,
    make_base,
    promote_run,
    record_canary,
    write_version_run,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.reliability
SECONDS_OF_A_START = 4.0
SECONDS_OF_A_SWAP = 1.5


def ask_until_refused(address: str) -> None:
    """Ask without a pause, until there is nobody to ask."""
    body = json.dumps({"prompt": "I want to see Italy.", "max_tokens": 12})
    with suppress(OSError, http.client.HTTPException):
        while True:
            connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
            connection.request("POST", "/v1/completions", body)
            connection.getresponse().read()
            connection.close()


def test_a_kill_in_any_phase_leaves_a_sound_registry_that_the_next_server_follows(tmp_path) -> None:
    base = make_base(MODEL, tmp_path / "base")
    runs = [write_version_run(tmp_path / f"run-{seed}", base, seed) for seed in (1, 2)]
    for run in runs:  # so that kills come while a canary is asked, too
        record_canary(run, base)
    registry = tmp_path / "registry"
    promote_run(runs[0], registry)
    draw = random.Random(35)
    words = ["serve", "--registry", str(registry), "--name", NAME, "--port", "0"]
    for _ in range(5):  # while it starts
        with (tmp_path / "start.log").open("w") as log:
            process = subprocess.Popen([str(PROGRAM), *words], stderr=log, text=True)
        time.sleep(draw.uniform(0.0, SECONDS_OF_A_START))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert audit(registry, NAME).is_sound
    for number in range(1, 9):  # while it answers, and swaps
        with serve_process(registry, tmp_path) as (process, address):
            asking = threading.Thread(target=ask_until_refused, args=(address,))
            asking.start()
            version = promote_run(runs[number % 2], registry)
            time.sleep(draw.uniform(0.0, SECONDS_OF_A_SWAP))
            process.send_signal(signal.SIGKILL)
            process.wait()
            asking.join()
        assert audit(registry, NAME).is_sound
        assert read_champion(registry, NAME) == version
        with serve_process(registry, tmp_path) as (process, address):
            wait_until(lambda: bool(health(address)["names"]))
            assert health(address)["names"][NAME]["version"] == version
