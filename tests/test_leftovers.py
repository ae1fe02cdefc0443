"""What a test leaves behind is found, each kind, and put back where that is possible."""

from __future__ import annotations

import multiprocessing.util
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.leftovers import ADVICE, MAY_STAY, Heard, Left, Watch, explain
from tests.waiting import wait_until

NAME = "NESTED_TUNE_LEFT"


@pytest.fixture(scope="module")
def heard() -> Heard:
    """Hears this process's events from here on; audit hooks cannot be taken away."""
    return Heard()


@pytest.fixture
def watch(heard: Heard, tmp_path: Path) -> Watch:
    return Watch(heard, [tmp_path], seconds=0)


def test_a_test_that_leaves_nothing_passes(heard: Heard, tmp_path: Path) -> None:
    watch = Watch(heard, [tmp_path], seconds=60)
    watch.begin()
    (tmp_path / "file").write_text("")
    subprocess.run(["true"], check=True)
    threading.Thread(target=time.sleep, args=(0.05,)).start()  # it is waited for
    assert watch.end(compares_random_states=True) == []


def test_a_process_of_multiprocessing_is_named(watch: Watch) -> None:
    watch.begin()
    sleep = str(shutil.which("sleep"))
    process = multiprocessing.util.spawnv_passfds(os.fsencode(sleep), [b"sleep", b"600"], [])
    command = Path(f"/proc/{process}/cmdline")
    wait_until(lambda: command.read_bytes().startswith(b"sleep"), "the program is loaded")
    (left,) = watch.end(compares_random_states=True)  # which kills it
    os.waitpid(process, 0)
    assert left == Left("process", "sleep 600 ")


def test_a_thread_and_a_socket_that_listens_are_named(watch: Watch) -> None:
    watch.begin()
    event = threading.Event()
    thread = threading.Thread(target=event.wait, name="still here")
    thread.start()
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = watch.end(compares_random_states=True)
        address = str(server.getsockname())
    event.set()
    thread.join()
    assert left == [Left("thread", "still here"), Left("listening socket", address)]


@pytest.mark.parametrize("command", ['exec cat "$0"', 'cat "$0" & exit 0'], ids=["own", "orphan"])
def test_a_process_is_named_whoever_its_parent_is(watch, tmp_path, command) -> None:
    if "&" in command and sys.platform != "linux":
        pytest.skip("finds processes of another parent in /proc")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    watch.begin()
    process = subprocess.Popen(["sh", "-c", command, str(pipe)], stdout=subprocess.DEVNULL)
    with pipe.open("w"):  # cat reads it, and ends with it
        if "&" in command:
            process.wait()
        (left,) = watch.end(compares_random_states=True)
    process.wait()
    assert (left.kind, "cat" in left.what) == ("process", True)


def test_a_variable_is_named_and_put_back(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "before")
    watch.begin()
    os.environ[NAME] = "after"
    assert watch.end(compares_random_states=True) == [Left("environment variable", NAME)]
    assert os.environ[NAME] == "before"


@pytest.mark.parametrize("draw", [random.random, np.random.random], ids=["random", "numpy"])
def test_a_changed_global_random_state_is_named_and_put_back(watch, draw) -> None:
    watch.begin()
    first = draw()
    (left,) = watch.end(compares_random_states=True)
    assert left.kind == "random state"
    assert draw() == first
    assert watch.end(compares_random_states=False) == []
    watch.end(compares_random_states=True)  # puts it back for the watch around this test


def test_a_file_outside_is_named_and_one_that_is_gone_is_not(heard, tmp_path, monkeypatch) -> None:
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path)
    watch = Watch(heard, [tmp_path / "own"])
    watch.begin()
    for name in ("own/file", "stays", "goes"):
        Path(name).write_text("")
    Path("goes").unlink()
    assert watch.end(compares_random_states=True) == [Left("file", str(tmp_path / "stays"))]


def test_the_message_says_what_was_left_and_what_to_do() -> None:
    text = explain([Left("thread", "a"), Left("thread", "b"), Left("file", "c")])
    assert [line for line in text.splitlines() if line.startswith("  - ")] == [
        "  - thread: a",
        "  - thread: b",
        "  - file: c",
    ]
    assert text.count(ADVICE["thread"]) == text.count(ADVICE["file"]) == 1


def test_what_may_stay_is_of_a_known_kind_and_has_a_reason() -> None:
    assert all(each.kind in ADVICE and each.why for each in MAY_STAY)
    assert Left("process", "python -P tests/fork_server.py 5 /tmp").may_stay
    assert not Left("process", "python worker.py").may_stay
    assert Left("file", "/root/.cache/cuda-python/program-cache/entries/07").may_stay
    assert not Left("file", "/root/.cache/other").may_stay
