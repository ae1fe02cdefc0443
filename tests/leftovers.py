"""What a test leaves behind, where the next one would meet it; a test that does so fails.

Around every test (`_a_leaves_nothing` in conftest.py) a `Watch` compares Python threads, processes,
listening sockets, environment variables and the states of the global random generators, and hears
from the interpreter's audit events which files were opened for writing. Threads and processes are
waited for first: what ends within SECONDS_TO_END disturbs nobody. What the fixtures of a module or
a session keep was there before the test began. What else may stay is named in MAY_STAY.
"""

from __future__ import annotations

import multiprocessing.util
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich.style  # noqa: F401 - it draws from `random` when it is imported

SECONDS_TO_END = 30.0  # a limit that a loaded machine does not reach
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Every process that a test starts inherits it, and so do those which that one starts.
WORKER_VARIABLE = "NESTED_TUNE_TESTS_WORKER"
VARIABLE_OF_PYTEST = "PYTEST_CURRENT_TEST"  # it sets it three times a test

ADVICE = {
    "thread": "Join it before the test ends, or leave the `with` block of what runs it.",
    "process": "Wait for it, or kill it in a `finally` and wait for it then.",
    "listening socket": "Close the server before the test ends.",
    "environment variable": "Set it by `monkeypatch.setenv`, which puts it back.",
    "random state": "Draw from a generator of the test's own (`random.Random(seed)`, "
    "`np.random.default_rng(seed)`); where the code under test seeds the global one, add "
    '`@pytest.mark.usefixtures("own_random_state")`.',
    "file": "Write below `tmp_path`.",
}


@dataclass(frozen=True)
class MayStay:
    """What outlives the test that first needs it, and why that disturbs no other."""

    kind: str  # a key of ADVICE
    pattern: str  # searched for in what the test left
    why: str


MAY_STAY = (
    MayStay(
        "thread",
        r"^(GlobalEventLoopThread|RunSyncEventLoopThread|AnyIO worker thread)$",
        "Prefect's event loops and their workers, which wait for what they are asked to run",
    ),
    MayStay("thread", r"^tqdm_monitor$", "tqdm's, one a process: it wakes up and redraws bars"),
    MayStay("thread", r"^Mlflow\w+_\d+$", "mlflow's pool for files, idle until it is collected"),
    MayStay("process", r"/fork_server\.py ", "one a worker: it forks the processes of all tests"),
    MayStay("process", r" \S*tokenizer_cell_program:do_job ", "two a process, which end with it"),
    MayStay(
        "process",
        r" -m prefect (server|worker) start |(^|/)postgres\b",
        "of the stack in tests/production: its tests kill and start it again, its fixture ends it",
    ),
    MayStay(
        "process",
        r"(^|/)chrom\S* .*--type=",
        "of the browser in tests/production: it starts one for a page, its fixture ends them all",
    ),
    MayStay(
        "environment variable",
        r"^(PYARROW_IGNORE_TIMEZONE|SPARK_LOCAL_IP|_RJEM_MALLOC_CONF)$",
        "pandera and polars set them when they are imported, for themselves",
    ),
    MayStay(
        "environment variable",
        r"^TRANSFORMERS_NO_ADVISORY_WARNINGS$",
        "mlx_lm sets it when it is imported",
    ),
    MayStay(
        "environment variable",
        r"^PREFECT_(RESULTS_DEFAULT_SERIALIZER|SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS)$",
        "flows sets them when it is imported, for Prefect",
    ),
    MayStay("file", r"/__pycache__(/|$)", "what Python compiles of a module when it is imported"),
    MayStay(
        "file",
        r"/\.cache/cuda-python(/|$)",
        "kernels that cuda-core has compiled on a machine with a GPU, and finds again",
    ),
    MayStay(
        "file", r"/\.hypothesis(/|$)", "the constants of our modules, which hypothesis draws from"
    ),
)


@dataclass(frozen=True)
class Left:
    """One thing that was not there before the test."""

    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"

    @property
    def may_stay(self) -> bool:
        return any(m.kind == self.kind and re.search(m.pattern, self.what) for m in MAY_STAY)


class Heard:
    """What audit events told since the last `clear`."""

    def __init__(self) -> None:
        self.started_processes = False
        self.bound_sockets = False
        self.changed_environment = False
        self.written: list[str] = []
        sys.addaudithook(self._hear)
        spawn = multiprocessing.util.spawnv_passfds

        def spawn_heard(*arguments: Any) -> int:
            self.started_processes = True
            return spawn(*arguments)

        # No audit event tells of it.
        setattr(multiprocessing.util, "spawnv_passfds", spawn_heard)  # noqa: B010

    def clear(self) -> None:
        """Forget what was heard so far."""
        self.started_processes = self.bound_sockets = self.changed_environment = False
        self.written.clear()

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            # A folder is opened so for a file without a name (O_TMPFILE).
            if flags & WRITES and not isinstance(path, int) and not os.path.isdir(path):
                self._write(path)
        elif event == "os.mkdir":
            if not os.path.lexists(arguments[0]):  # else it is not made, or was there
                self._write(arguments[0])
        elif event in {"os.rename", "os.link", "os.symlink"}:
            self._write(arguments[1])
        elif event in {"subprocess.Popen", "os.fork", "os.posix_spawn"}:
            self.started_processes = True
        elif event == "socket.bind":
            self.bound_sockets = True
        elif event in {"os.putenv", "os.unsetenv"}:
            self.changed_environment |= os.fsdecode(arguments[0]) != VARIABLE_OF_PYTEST

    def _write(self, path: Any) -> None:
        with suppress(FileNotFoundError):  # there is no working folder
            self.written.append(os.path.abspath(os.fsdecode(path)))


class Watch:
    """Compares this process before and after a test.

    folders: those that tests may write in.
    seconds: how long to wait for threads and processes that are about to end.
    """

    def __init__(
        self, heard: Heard, folders: Iterable[Path], seconds: float = SECONDS_TO_END
    ) -> None:
        self._heard = heard
        self._folders = tuple(f"{folder.resolve()}{os.sep}" for folder in folders)
        self._seconds = seconds
        self._has_looked = False
        self._threads: set[threading.Thread] = set()
        self._processes: dict[int, str] = {}
        self._sockets: dict[int, str] = {}
        self._environment: dict[str, str] = {}
        self._random_state: Any = None
        self._numpy_state: Any = None

    def begin(self) -> None:
        """Look before a test. What its session's and module's fixtures started is there already."""
        if self._heard.started_processes or not self._has_looked:
            self._processes = own_processes()
        if self._heard.bound_sockets or not self._has_looked:
            self._sockets = listening_sockets()
        if self._heard.changed_environment or not self._has_looked:
            self._environment = _environment()
        self._has_looked = True
        self._threads = set(threading.enumerate())
        self._random_state = random.getstate()
        self._numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
        self._heard.clear()

    def end(self, *, compares_random_states: bool) -> list[Left]:
        """Look after the test: what it left. Variables and random states are put back."""
        heard = self._heard
        left = [Left("thread", thread.name) for thread in self._threads_left()]
        if heard.started_processes:
            left += [Left("process", command) for command in self._processes_left()]
        if heard.bound_sockets:
            new = listening_sockets()
            left += [Left("listening socket", new[key]) for key in set(new) - set(self._sockets)]
        if heard.changed_environment:
            left += self._environment_changes()
        if compares_random_states:
            left += self._random_changes()
        left += [Left("file", path) for path in self._files_left()]
        return [one for one in left if not one.may_stay]

    def _threads_left(self) -> set[threading.Thread]:
        def new() -> set[threading.Thread]:
            # With those that are about to begin, which cannot be joined yet.
            found = set(threading.enumerate()) - self._threads - {threading.current_thread()}
            return {one for one in found if not Left("thread", one.name).may_stay}

        deadline = time.monotonic() + self._seconds
        while (found := new()) and time.monotonic() < deadline:
            time.sleep(0.005)
        return found

    def _processes_left(self) -> list[str]:
        def new() -> dict[int, str]:
            return {
                process: command
                for process, command in own_processes().items()
                if process not in self._processes and not Left("process", command).may_stay
            }

        deadline = time.monotonic() + self._seconds
        while (found := new()) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in found:  # it would work on beside the tests that follow
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return list(found.values())

    def _environment_changes(self) -> list[Left]:
        before, after = self._environment, _environment()
        changed = sorted(n for n in before.keys() | after if before.get(n) != after.get(n))
        left = [Left("environment variable", name) for name in changed]
        for one in left:
            if one.may_stay:
                continue
            if one.what in before:
                os.environ[one.what] = before[one.what]
            else:
                del os.environ[one.what]
        return left

    def _random_changes(self) -> list[Left]:
        left = []
        if random.getstate() != self._random_state:
            left.append(Left("random state", "that of `random`"))
            random.setstate(self._random_state)
        state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
        before = self._numpy_state["state"]
        if state["pos"] != before["pos"] or not np.array_equal(state["key"], before["key"]):
            left.append(Left("random state", "that of `numpy.random`"))
            np.random.set_state(self._numpy_state)  # noqa: NPY002
        return left

    def _files_left(self) -> list[str]:
        outside = {path for path in self._heard.written if not path.startswith(self._folders)}
        return sorted(path for path in outside if os.path.isfile(path) or os.path.isdir(path))


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != VARIABLE_OF_PYTEST}


def own_processes() -> dict[int, str]:
    """The command lines of processes that this one started, or that those started.

    Those that have ended are left out, whether anybody waited for them or not.
    """
    if sys.platform != "linux":
        return _children_by_ps()
    mark = f"\0{WORKER_VARIABLE}={os.environ[WORKER_VARIABLE]}\0".encode()
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        folder = Path("/proc", name)
        try:
            state, parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            is_own = int(parent) == os.getpid() or mark in b"\0" + (folder / "environ").read_bytes()
            if is_own and int(name) != os.getpid() and state not in b"ZX":
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(name)] = command.decode(errors="replace")
        except (OSError, ValueError):  # it has ended, or is another user's
            continue
    return found


def _children_by_ps() -> dict[int, str]:
    words = ["ps", "-A", "-o", "pid=,ppid=,stat=,command="]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split(None, 3) for line in lines]
    return {
        int(pid): command
        for pid, parent, state, command in rows
        if int(parent) == os.getpid() and "Z" not in state and not command.startswith("ps ")
    }


def listening_sockets() -> dict[int, str]:
    """The addresses at which this process listens, by file descriptor."""
    found = {}
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # the descriptor of the listing, and those that are no sockets
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    found[int(name)] = str(copy.getsockname())
    return found


def explain(left: list[Left]) -> str:
    """What a test left, and what to do about each kind."""
    lines = ["This test left behind, where the next test meets it:"]
    lines += [f"  - {one}" for one in left]
    lines += [ADVICE[kind] for kind in dict.fromkeys(one.kind for one in left)]
    lines.append(
        "What is meant to stay is named in MAY_STAY of tests/leftovers.py, with the reason."
    )
    return "\n".join(lines)
