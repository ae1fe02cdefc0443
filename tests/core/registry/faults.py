"""A kill or an I/O error at the Nth call to the operating system, and processes that race."""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHANGING_CALLS = [
    *("chmod", "close", "fsync", "ftruncate", "mkdir", "open"),
    *("rename", "replace", "rmdir", "symlink", "unlink", "write"),
]
READING_CALLS = ["fstat", "listdir", "lstat", "read", "readlink", "scandir", "stat"]
WRITE, CLOSE = os.write, os.close
Action = Callable[[Path], object]


class InjectedError(OSError):
    """The failure of a test; nothing may turn it into another error."""


class Faults:
    """Notes calls to the operating system and fails the one whose number is `fail_at`."""

    def __init__(self, fail_at: int, failure: Callable[[], None]) -> None:
        self.seen: list[str] = []
        self.fail_at, self.failure = fail_at, failure

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.seen.append(call.__name__)
            if len(self.seen) == self.fail_at:
                if call is WRITE:  # a crash in the middle of a write leaves a part of it
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                if call is CLOSE:  # the descriptor is gone even where close() reports an error
                    call(*arguments)
                self.failure()
            return call(*arguments, **options)

        return counted


@contextmanager
def injected(
    fail_at: int, failure: Callable[[], None], calls: list[str] = CHANGING_CALLS
) -> Iterator[Faults]:
    """Wrap the named calls of the `os` module, open() and flock()."""
    faults = Faults(fail_at, failure)
    places = [(os, name) for name in calls] + [(io, "open"), (builtins, "open")]
    places.append((fcntl, "flock"))
    originals = [getattr(module, name) for module, name in places]
    try:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, faults.wrap(original))
        yield faults
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raise_io_error() -> None:
    raise InjectedError(errno.EIO, "injected")


def killed_at(fail_at: int, action: Action, registry: Path) -> bool:
    """Run `action` in a forked process that is killed at call `fail_at`; whether it was.

    Only calls that change something count: a kill at any other leaves what the one before it left.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with injected(fail_at, kill_self):
                action(registry)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def failed_at(fail_at: int, action: Action, registry: Path) -> bool:
    """Run `action` here with an EIO at call `fail_at`; whether that call came."""
    everything = CHANGING_CALLS + READING_CALLS
    with injected(fail_at, raise_io_error, everything) as faults, suppress(InjectedError):
        action(registry)
    return len(faults.seen) >= fail_at


def copies(template: Path, every: int = 1) -> Iterator[tuple[int, Path]]:
    """Fresh copies of a registry, with the number of the call to fail in each.

    every: the calls to fail are this far apart, beginning with the first.
    """
    for number in range(1, 2000, every):
        copy = template.with_name(f"copy-{number}")
        shutil.copytree(template, copy, symlinks=True)
        yield number, copy
        shutil.rmtree(copy)
    raise AssertionError("the action never came to its end")


def in_processes(count: int, work: Callable[[int], None]) -> None:
    """Run `work(i)` in `count` forked processes that start together."""
    start = os.pipe()
    children = []
    for index in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(start[1])
                os.read(start[0], 1)  # returns when the parent closes its end
                work(index)
                status = 0
            except BaseException:
                traceback.print_exc()  # else nobody learns why it ended with 1
            finally:
                os._exit(status)
        children.append(child)
    os.close(start[0])
    os.close(start[1])
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count
