"""A small parent of a command that trains: where the command is killed, it begins it again.

macOS ends processes that keep its GPU too long, and any system ends one when memory runs out. A
run goes on from its last checkpoint to the bit, so nobody has to do that by hand. The command is a
process group of its own, and ends with its parent (process/command_parent.py).

`python -P -m nested_core.rooms.restart.restarting -m MODULE` runs any program of Python
so; the command line does it by itself for `train` and `run`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from nested_core.errors import TrainingProcessLost, go_on_with
from nested_core.process.command_parent import PARENT_VARIABLE, STOP_SIGNALS, Restart, RunInHand

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
MAX_MESSAGE_BYTES = 64 * 1024
CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_CONTROL_GROUPS = Path("/proc/self/cgroup")
# Of a control group, in versions 2 and 1: how often the system killed for want of memory, and the
# most memory that it may have.
OOM_COUNTERS = ("memory.events", "memory.oom_control")
MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")
UNLIMITED = 2**62  # version 1 says about 2**63


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

    def read_run(self) -> RunInHand | None:
        """Return the run that it told of last; it has ended, so all of it is here."""
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
            forwarding.attach(command.process)
            code = forwarding.wait(command.process)
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
            newest = _newest_checkpoint(run.path)
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


def _newest_checkpoint(run: Path) -> str:
    """Return the name of a run's newest checkpoint, which sorts by its step; empty without one."""
    # Needed after a kill alone, and what it imports takes memory.
    from nested_core.storage.checkpoint_verification import list_checkpoints
    from nested_core.storage.run_directory import RunDirectory

    named = list_checkpoints(RunDirectory(run).checkpoints)
    return named[-1].name if named else ""


class _Forwarding:
    """Within the block, signals to this process are the command's; and it stops and goes on too."""

    def __init__(self) -> None:
        self._receive, self._send = os.pipe()  # the number of each signal
        os.set_blocking(self._send, False)
        self._process: subprocess.Popen[bytes] | None = None
        self._pending: list[int] = []  # signals that came while no command ran
        self.is_ending = False

    def __enter__(self) -> _Forwarding:
        self._fd_before = signal.set_wakeup_fd(self._send, warn_on_full_buffer=False)
        self._before = {
            number: signal.signal(number, self._forward)
            for number in (*STOP_SIGNALS, signal.SIGTSTP, signal.SIGCONT)
        }
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._receive)
        os.close(self._send)

    def attach(self, process: subprocess.Popen[bytes]) -> None:
        """Forward signals to this process; first those that came while it was being started."""
        self._process = process
        while self._pending:
            self._forward(self._pending.pop(0))

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Return the exit code of a process when it has ended.

        waitpid would sleep on where the system gives a signal to another thread, such as one of
        OpenBLAS.
        """
        while (code := process.poll()) is None:
            os.read(self._receive, 1)
        return code

    def _forward(self, number: int, frame: FrameType | None = None) -> None:
        self.is_ending = self.is_ending or number in STOP_SIGNALS
        if self._process is None or self._process.returncode is not None:
            self._pending.append(number)
            return
        sent = signal.SIGSTOP if number == signal.SIGTSTP else signal.Signals(number)
        # To stop and go on is for the whole group. The end is the command's alone: g++, which
        # compiles MLX's kernels for it, would end too, and the step in hand with it.
        whom = self._process.pid if number in STOP_SIGNALS else -self._process.pid
        with suppress(ProcessLookupError):
            os.kill(whom, sent)
        if number == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)


def _end_by(number: int) -> int:
    """End by a signal, as the command did; the exit code of a shell where that is not the end."""
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(os.getpid(), number)
    return 128 + number


def count_memory_kills() -> int:
    """Count the processes of this control group killed for want of memory; 0 if unknown."""
    counts = dict(line.split() for line in _read_memory_file(OOM_COUNTERS).splitlines())
    return int(counts.get("oom_kill", 0))


def _read_memory_file(names: Sequence[str]) -> str:
    """Return the first of these files that this process's control group has; empty without any.

    In a container the group's path may be one that is not to be seen there: then it is the top.
    """
    places = []
    with suppress(OSError):
        for line in OWN_CONTROL_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                places.append(CONTROL_GROUPS / controllers / path.lstrip("/"))
    for folder in (*places, CONTROL_GROUPS, CONTROL_GROUPS / "memory"):
        for name in names:
            with suppress(OSError):
                return (folder / name).read_text()
    return ""


def _describe_memory() -> str:
    """Return the limit of the control group; empty without one."""
    limit = _read_memory_file(MEMORY_LIMITS).strip()
    if limit.isdigit() and int(limit) < UNLIMITED:
        return f" The limit of its control group is {int(limit) / 1e9:.3g} GB."
    return ""


def describe_end(number: int, *, was_memory: bool) -> str:
    """Explain by what a process was ended, and what helps, in one or two sentences."""
    name = signal.Signals(number).name
    if was_memory:
        return (
            f"the system killed it ({name}) because memory ran out: a smaller batch_size or "
            f"max_seq_length, or grad_checkpoint, needs less.{_describe_memory()}"
        )
    if number == signal.SIGKILL:
        return f"it was killed ({name}), as a system does when memory runs out.{_describe_memory()}"
    helps = ""
    if sys.platform == "darwin":
        helps = (
            " macOS ends work on its GPU that competes with a display that is on: let it sleep "
            "(pmset displaysleepnow), or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1."
        )
    return f"it was ended by {name}; its last output is above.{helps}"


if __name__ == "__main__":
    sys.exit(run_again_where_killed([sys.executable, *sys.argv[1:]]))


RESTART = Restart(run_again_where_killed)
