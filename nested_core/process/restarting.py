"""A small parent of a command that trains: where the command is killed, it begins it again.

macOS ends processes that keep its GPU too long, and any system ends one when memory runs out. A
run goes on from its last checkpoint to the bit, so nobody has to do that by hand. The parent is
Python's standard library alone; the command is a process group of its own, and ends with it.

`python -P -m nested_core.process.restarting -m prefect.engine` runs any program of Python so; the
command line does it by itself for `train` and `run`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from nested_core.errors import TrainingProcessLost, go_on_with

# In the command's environment: the process id of its parent, the file that leads to it, and the
# names of the signals that ended the command before, each behind a colon.
PARENT_VARIABLE = "NESTED_TUNE_PARENT"
# What ends a process through no wish of anybody's. SIGTRAP and SIGILL are how macOS aborts.
CRASH_SIGNALS = frozenset(
    {
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGKILL,
        signal.SIGSEGV,
        signal.SIGTRAP,
    }
)
FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MAX_MESSAGE_BYTES = 64 * 1024
# Of the control group, in versions 2 and 1: how often the system killed for want of memory.
OOM_COUNTERS = (
    Path("/sys/fs/cgroup/memory.events"),
    Path("/sys/fs/cgroup/memory/memory.oom_control"),
)
STEP_PREFIX = "step-"  # of a checkpoint's folder


@dataclass(frozen=True)
class RunInHand:
    """The run that a command works on, as it told its parent.

    restarts: how often it may be begun again without a new checkpoint between.
    """

    path: Path
    restarts: int

    def newest_checkpoint(self) -> str:
        """The name of the newest checkpoint, which sorts by its step; empty without one."""
        names = []
        with suppress(OSError):
            names = [name for name in os.listdir(self.path / "checkpoints") if _is_step(name)]
        return max(names, default="")


def _is_step(name: str) -> bool:
    return name.startswith(STEP_PREFIX) and name.removeprefix(STEP_PREFIX).isdigit()


# ------------------------------------------------------------------------ the command's side


_given: tuple[int, int, tuple[str, ...]] | None = None
_parent: socket.socket | None = None


def _take_given() -> tuple[int, int, tuple[str, ...]] | None:
    """What the variable said: the parent, the file that leads to it, and the earlier ends.

    It is taken out of the environment, for it is meant for this process and for none that it
    starts. A process whose parent has ended before it could look ends here.
    """
    global _given
    given = os.environ.pop(PARENT_VARIABLE, None)
    if given is not None:
        process, file, *ends = given.split(":")
        if int(process) != os.getppid():
            os.kill(os.getpid(), signal.SIGKILL)
        _given = int(process), int(file), tuple(ends)
    return _given


def has_parent() -> bool:
    """Whether this process was started by `run_again_where_killed`."""
    return _take_given() is not None


def command_process() -> int:
    """The id of the process that a person or a worker started for what this one does."""
    given = _take_given()
    return os.getpid() if given is None else given[0]


def list_earlier_ends() -> tuple[str, ...]:
    """The names of the signals that ended the processes before this one, of the same command."""
    given = _take_given()
    return () if given is None else given[2]


def end_with_parent() -> None:
    """Have this process end at once when its parent has; nothing where it has no such parent."""
    global _parent
    given = _take_given()
    if given is None or _parent is not None:
        return
    _parent = socket.socket(fileno=given[1])
    _parent.set_inheritable(False)
    threading.Thread(target=_await_end, args=(_parent,), name="parent", daemon=True).start()


def _await_end(parent: socket.socket) -> None:
    with suppress(OSError):
        while parent.recv(1):
            pass
    os.kill(os.getpid(), signal.SIGKILL)


def tell_parent(run: RunInHand) -> None:
    """Tell the parent which run to go on with, if this process has one."""
    end_with_parent()
    if _parent is not None:
        with suppress(OSError):
            _parent.sendall(json.dumps([str(run.path.resolve()), run.restarts]).encode() + b"\n")


# ------------------------------------------------------------------------ the parent's side


class _Command:
    """One start of the command: its process, and the socket on which it tells of its run."""

    def __init__(self, words: Sequence[str], ends: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            variable = ":".join([str(os.getpid()), str(theirs.fileno()), *ends])
            self.process = subprocess.Popen(
                words,
                env=os.environ | {PARENT_VARIABLE: variable},
                pass_fds=[theirs.fileno()],
                process_group=0,
            )

    def wait(self) -> int:
        """Its exit code when it has ended."""
        return self.process.wait()

    def read_run(self) -> RunInHand | None:
        """The run that it told of last; it has ended, so all of it is here."""
        with self._socket:
            self._socket.setblocking(False)
            try:
                told = self._socket.recv(MAX_MESSAGE_BYTES)
            except OSError:
                return None
        lines = told.splitlines()
        if not lines:
            return None
        path, restarts = json.loads(lines[-1])
        return RunInHand(Path(path), restarts)


def run_again_where_killed(
    words: Sequence[str], resume_with: Callable[[Path], Sequence[str]] = lambda run: ()
) -> int:
    """Run a command to its end, again each time that it is killed; return its exit code.

    `resume_with` gives the words to add where the command is begun again, of the run's folder. A
    command is begun again once it has told of its run, and no more often than that allows without
    a new checkpoint between; never after a signal that asked this process to end. Where it is not,
    this process ends by the same signal. Raises TrainingProcessLost where the bound is reached.
    """
    restarts = 0
    ends: list[str] = []
    checkpoint = ""
    run: RunInHand | None = None
    added: Sequence[str] = ()
    with _Forwarding() as forwarding:
        while True:
            kills = count_memory_kills()
            command = _Command([*words, *added], ends)
            forwarding.process = command.process
            code = command.wait()
            run = command.read_run() or run
            if code >= 0:
                return code
            if (
                run is None
                or run.restarts == 0
                or forwarding.is_ending
                or -code not in CRASH_SIGNALS
            ):
                return _end_by(-code)
            ends.append(signal.Signals(-code).name)
            newest = run.newest_checkpoint()
            restarts = 1 if newest > checkpoint else restarts + 1
            checkpoint = newest
            cause = describe_end(-code, was_memory=count_memory_kills() > kills)
            if restarts > run.restarts:
                raise TrainingProcessLost(
                    f"Training of {run.path} was ended {restarts} times in a row without a new "
                    f"checkpoint, and is not begun again (training.restarts: {run.restarts}). The "
                    f"last time {cause}",
                    advice=go_on_with(run.path),
                )
            where = f"from {newest}" if newest else "from its beginning"
            sys.stderr.write(f"warning: {cause} It goes on {where}, by itself.\n")
            added = resume_with(run.path)


class _Forwarding:
    """Within the block, signals to this process are the command's; and it stops and goes on too."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.is_ending = False

    def __enter__(self) -> _Forwarding:
        self._before = {
            number: signal.signal(number, self._forward)
            for number in (*FORWARDED_SIGNALS, signal.SIGTSTP, signal.SIGCONT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.is_ending = self.is_ending or number in FORWARDED_SIGNALS
        if self.process is None or self.process.returncode is not None:
            return
        sent = signal.SIGSTOP if number == signal.SIGTSTP else signal.Signals(number)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, sent)
        if number == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)


def _end_by(number: int) -> int:
    """End by a signal, as the command did; the exit code of a shell where that is not the end."""
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(os.getpid(), number)
    return 128 + number


def count_memory_kills() -> int:
    """How often the system has killed for want of memory in this control group; 0 if unknown."""
    for path in OOM_COUNTERS:
        with suppress(OSError):
            counts = dict(line.split() for line in path.read_text().splitlines())
            return int(counts.get("oom_kill", 0))
    return 0


def describe_end(number: int, *, was_memory: bool) -> str:
    """By what a process was ended, and what helps, in one or two sentences."""
    name = signal.Signals(number).name
    if was_memory:
        return (
            f"the system killed it ({name}) because memory ran out: a smaller batch_size or "
            f"max_seq_length, or grad_checkpoint, needs less."
        )
    if number == signal.SIGKILL:
        return f"it was killed ({name}), as a system does when memory runs out."
    helps = ""
    if sys.platform == "darwin":
        helps = (
            " macOS ends work that keeps its GPU too long: a smaller batch_size helps, "
            "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1, and an open lid."
        )
    return f"it was ended by {name}; its last output is above.{helps}"


if __name__ == "__main__":
    sys.exit(run_again_where_killed([sys.executable, *sys.argv[1:]]))
