"""A training command as the child of the small parent that restarts it if it is killed.

The room restart has the parent. Here the command tells the parent which run it works on, and ends
when the parent ends.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# In the command's environment, separated by colons: the parent's process id, the descriptor of a
# socket to it, and the names of the signals that ended the command's earlier processes.
PARENT_VARIABLE = "NESTED_TUNE_PARENT"
# In the message of MLX's error when macOS ends work on the GPU. MLX may also abort the process.
METAL_FAILURE = "[METAL] Command buffer execution failed"
# What asks a command to end; a closed terminal (SIGHUP) not where it is ignored, as after `nohup`.
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    STOP_SIGNALS.append(signal.SIGHUP)


@dataclass(frozen=True)
class Restart:
    """A room's parent of a training command.

    run_again: runs a command, and again with more words, which depend on its run, where it is
        killed. Returns its exit code.
    """

    run_again: Callable[[Sequence[str], Callable[[Path], Sequence[str]]], int]


@dataclass(frozen=True)
class RunInHand:
    """The run that a command works on, as reported to its parent.

    restarts: how often the command may be restarted without a new checkpoint in between.
    """

    path: Path
    restarts: int


STARTED = time.time()  # about when this process started: the command line imports this first

_parent_info: tuple[int, int, tuple[str, ...]] | None = None
_parent: socket.socket | None = None


def _take_parent_info() -> tuple[int, int, tuple[str, ...]] | None:
    """Return the parent's process id, the socket's descriptor and the earlier signals, or None.

    Reads PARENT_VARIABLE and removes it from the environment, because it is not meant for processes
    that this one starts. If the parent has already ended, this process ends too.
    """
    global _parent_info
    value = os.environ.pop(PARENT_VARIABLE, None)
    if value is not None:
        parent_id, descriptor, *signals = value.split(":")
        if int(parent_id) != os.getppid():
            os.kill(os.getpid(), signal.SIGKILL)
        _parent_info = int(parent_id), int(descriptor), tuple(signals)
    return _parent_info


def has_parent() -> bool:
    """Whether this process was started by `run_again_where_killed`."""
    return _take_parent_info() is not None


def command_process() -> int:
    """Return the id of the process that a person or a worker started: the parent's, if any."""
    parent_info = _take_parent_info()
    return os.getpid() if parent_info is None else parent_info[0]


def list_earlier_ends() -> tuple[str, ...]:
    """Return the names of the signals that ended the earlier processes of this command."""
    parent_info = _take_parent_info()
    return () if parent_info is None else parent_info[2]


def end_with_parent() -> None:
    """Make this process end as soon as its parent does; does nothing without such a parent."""
    global _parent
    parent_info = _take_parent_info()
    if parent_info is None or _parent is not None:
        return
    _parent = socket.socket(fileno=parent_info[1])
    _parent.set_inheritable(False)
    threading.Thread(target=_await_end, args=(_parent,), name="parent", daemon=True).start()


def _await_end(parent: socket.socket) -> None:
    """Read from the parent's socket until it closes, then kill this process."""
    with suppress(OSError):
        while parent.recv(1):
            pass
    os.kill(os.getpid(), signal.SIGKILL)


def tell_parent(run: RunInHand) -> None:
    """Tell the parent, if there is one, which run to continue after a restart."""
    end_with_parent()
    if _parent is not None:
        with suppress(OSError):
            _parent.sendall(json.dumps([str(run.path.resolve()), run.restarts]).encode() + b"\n")


@contextmanager
def aborting_where_metal_failed() -> Iterator[None]:
    """Abort this process at an error of Metal in the block, so that its parent restarts it.

    Without a parent the error is raised as usual.
    """
    try:
        yield
    except Exception as error:
        if has_parent() and any(METAL_FAILURE in str(e) for e in (error, error.__cause__)):
            traceback.print_exc()
            sys.stderr.flush()
            os.abort()
        raise
