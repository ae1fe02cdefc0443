"""A command that trains, as a process below the small parent that begins it again if it is killed.

The room restart has the parent. What it wants to know of the command is told here, and
the command ends with it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# In the command's environment: the process id of its parent, the file that leads to it, and the
# names of the signals that ended the command before, each behind a colon.
PARENT_VARIABLE = "NESTED_TUNE_PARENT"
# Of MLX's errors, where macOS ended the work on its GPU; MLX aborts there, or raises it.
METAL_FAILURE = "[METAL] Command buffer execution failed"


@dataclass(frozen=True)
class RunInHand:
    """The run that a command works on, as it tells its parent.

    restarts: how often it may be begun again without a new checkpoint between.
    """

    path: Path
    restarts: int


STARTED = time.time()  # when this process was, about: the command line imports this first

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


@contextmanager
def aborting_where_metal_failed() -> Iterator[None]:
    """Abort this process at an error of Metal, so that its parent begins it again."""
    try:
        yield
    except Exception as error:
        if has_parent() and any(METAL_FAILURE in str(each) for each in (error, error.__cause__)):
            traceback.print_exc()
            sys.stderr.flush()
            os.abort()
        raise
