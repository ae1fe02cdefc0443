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
from collections.abc import Callable, Iterator
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


@pytest.fixture
def ended() -> Iterator[list[Callable[[], object]]]:
    """What ends what a test started, in the reverse order."""
    calls: list[Callable[[], object]] = []
    yield calls
    for call in reversed(calls):
        call()


def test_a_test_that_leaves_nothing_passes(watch: Watch, tmp_path: Path) -> None:
    watch.begin()
    (tmp_path / "file").write_text("")
    subprocess.run(["true"], check=True)
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert watch.end(compares_random_states=True) == []
    code = test_a_test_that_leaves_nothing_passes.__code__
    places = {f"tests/test_leftovers.py:{code.co_firstlineno + at}" for at in (3, 5)}
    assert watch.starts == places


def test_a_process_of_multiprocessing_is_named(watch: Watch) -> None:
    watch.begin()
    sleep = shutil.which("sleep")
    assert sleep is not None
    process = multiprocessing.util.spawnv_passfds(os.fsencode(sleep), [b"sleep", b"600"], [])
    command = Path(f"/proc/{process}/cmdline")
    wait_until(lambda: command.read_bytes().startswith(b"sleep"), "the program is loaded")
    (left,) = watch.end(compares_random_states=True)  # which kills it
    os.waitpid(process, 0)
    assert left == Left("process", "sleep 600 ")


def test_a_thread_is_named(watch: Watch, ended: list[Callable[[], object]]) -> None:
    watch.begin()
    event = threading.Event()
    thread = threading.Thread(target=event.wait, name="still here")
    thread.start()
    ended.extend([thread.join, event.set])
    assert watch.end(compares_random_states=True) == [Left("thread", "still here")]


def test_a_thread_that_is_about_to_end_is_waited_for(heard: Heard) -> None:
    watch = Watch(heard, [], seconds=60)
    watch.begin()
    threading.Thread(target=time.sleep, args=(0.05,)).start()
    assert watch.end(compares_random_states=True) == []


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


def test_a_listening_socket_is_named_by_its_address(watch, ended) -> None:
    watch.begin()
    server = socket.create_server(("127.0.0.1", 0))
    ended.append(server.close)
    (left,) = watch.end(compares_random_states=True)
    assert left == Left("listening socket", str(server.getsockname()))


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
