"""A kill or an error at the Nth system call of a forked process, through ptrace: Linux alone.

Nothing is wrapped: what is stopped is what the kernel is asked, by Python, libc or a library. Needs
neither strace nor a compiler. Errors are written into registers, which is done for x86_64 only.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from nested_core.errors import NestedTuneError

Failure = Literal["kill", "torn", "EIO", "ENOSPC", "EINTR", "EMFILE"]

TRACEME, POKEUSER, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 6, 24, 0x4200, 0x420E
TRACE_SYSGOOD, EXIT_KILL = 0x1, 0x100000
ENTRY = 1
REFUSED, UNEXPECTED = 3, 4

# Offsets in struct user_regs_struct (sys/user.h, x86_64): the result, the third argument, and the
# number of the call as it was entered with, where -1 makes it no call at all.
RAX, RDX, ORIG_RAX = 10 * 8, 12 * 8, 15 * 8

# asm/unistd_64.h: the calls that ask something of a file system, and can fail as one does.
FILE_CALLS = {
    **{0: "read", 1: "write", 2: "open", 3: "close", 4: "stat", 5: "fstat", 6: "lstat"},
    **{8: "lseek", 16: "ioctl", 17: "pread64", 18: "pwrite64", 20: "writev", 21: "access"},
    **{32: "dup", 40: "sendfile", 72: "fcntl", 73: "flock", 74: "fsync", 75: "fdatasync"},
    **{77: "ftruncate", 79: "getcwd", 82: "rename", 83: "mkdir", 84: "rmdir", 86: "link"},
    **{87: "unlink", 88: "symlink", 89: "readlink", 90: "chmod", 91: "fchmod", 217: "getdents64"},
    **{257: "openat", 258: "mkdirat", 262: "newfstatat", 263: "unlinkat", 264: "renameat"},
    **{265: "linkat", 266: "symlinkat", 267: "readlinkat", 268: "fchmodat", 269: "faccessat"},
    **{285: "fallocate", 316: "renameat2", 326: "copy_file_range", 332: "statx"},
}
WRITE = 1


_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


class _Entry(ctypes.Structure):
    """The head of struct ptrace_syscall_info (linux/ptrace.h), as it is at a call's entry."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction_pointer", ctypes.c_uint64),
        ("stack_pointer", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


@dataclass(frozen=True)
class Interrupted:
    """What became of the process: the call that was met, if it came, and its exit code, if any."""

    call: str | None
    exit_code: int | None

    @property
    def has_returned(self) -> bool:
        """Whether the action came to its end, and said nothing of an error."""
        return self.exit_code == 0


def can_fail(failure: Failure) -> bool:
    """Whether this machine can be made to fail so."""
    if sys.platform != "linux":
        return False
    return failure == "kill" or platform.machine() == "x86_64"


# For tests that run an action once for each of its system calls: the failures, and every how many
# calls. In the suite a sample; each single call in the tests of reliability.
FAILURES = [
    pytest.param(
        failure,
        marks=[
            pytest.mark.skipif(not can_fail(failure), reason="Linux, x86_64"),
            *(
                [pytest.mark.slow("interrupts a process at many calls")]
                if failure != "kill"
                else []
            ),
        ],
    )
    for failure in get_args(Failure)
]
EVERY_CALL, SAMPLE = pytest.param(1, marks=pytest.mark.reliability), 131


@functools.cache
def can_trace() -> bool:
    """Whether this machine lets a process be traced at all: some containers do not."""
    if sys.platform != "linux":
        return False
    try:
        return interrupted_at(1, "kill", os.getppid).call is not None
    except (OSError, AssertionError):
        return False


def interrupted_at(number: int, failure: Failure, action: Callable[[], object]) -> Interrupted:
    """Run `action` in a forked process that meets `failure` at its call `number`, from 1.

    "kill" counts every call, the others those that ask something of a file system ("torn": those
    that write; half of the bytes arrive, and the process is killed). The action must not answer a
    failure with anything but an OSError or an error of ours.
    """
    child = os.fork()
    if child == 0:
        _run_traced(action)
    try:
        os.waitpid(child, 0)
        _ptrace(SETOPTIONS, child, 0, TRACE_SYSGOOD | EXIT_KILL)
        met = _trace(child, number, failure)
        code = _end(child)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    assert code != UNEXPECTED, f"{met} failed with {failure}: the traceback is above"
    return Interrupted(met, code)


def each_call(
    source: Path, failure: Failure, stride: int, action: Callable[[Path], object]
) -> Iterator[tuple[Path, bool]]:
    """Copies of `source` in which `action` met the failure at a call, and whether it returned."""
    for number in range(1, 100_000, stride):
        copy = shutil.copytree(source, source.with_name("copy"), symlinks=True)
        met = interrupted_at(number, failure, functools.partial(action, copy))
        if met.call is None:
            assert met.has_returned
        else:
            yield copy, met.has_returned
        shutil.rmtree(copy)
        if met.call is None:
            return


def _run_traced(action: Callable[[], object]) -> None:
    code = UNEXPECTED
    try:
        _ptrace(TRACEME, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        action()
        code = 0
    except (OSError, NestedTuneError):
        code = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _trace(child: int, number: int, failure: Failure) -> str | None:
    """Let the process run to its call `number` and fail it; the call's name, or None at the end."""
    seen = 0
    while (entry := _next_entry(child)) is not None:
        if failure == "kill" or entry.number in FILE_CALLS:
            seen += failure != "torn" or entry.number == WRITE
        if seen == number:
            _fail(child, failure, entry)
            return FILE_CALLS.get(entry.number, f"call {entry.number}")
    return None


def _fail(child: int, failure: Failure, entry: _Entry) -> None:
    if failure == "torn":
        _ptrace(POKEUSER, child, RDX, entry.arguments[2] // 2)
        _continue(child)
    elif failure != "kill":
        _ptrace(POKEUSER, child, ORIG_RAX, -1)
        _continue(child)
        _ptrace(POKEUSER, child, RAX, -getattr(errno, failure))
    if failure in ("kill", "torn"):
        os.kill(child, signal.SIGKILL)


def _next_entry(child: int) -> _Entry | None:
    """Go on to the next entry into a call; None where the process has ended instead."""
    while True:
        status = _continue(child)
        if status is None:
            return None
        info = _Entry()
        _ptrace(GET_SYSCALL_INFO, child, ctypes.sizeof(info), ctypes.addressof(info))
        if info.op == ENTRY:
            return info


_ended: dict[int, int] = {}


def _continue(child: int) -> int | None:
    with suppress(ProcessLookupError):  # killed, and not waited for yet
        _ptrace(SYSCALL, child, 0, 0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) or os.WIFSIGNALED(status):
        _ended[child] = status
        return None
    return status


def _end(child: int) -> int | None:
    """Let the process run to its end; its exit code, or None where it was killed."""
    while child not in _ended:
        _continue(child)
    status = _ended.pop(child)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None


def _ptrace(request: int, child: int, address: int, data: int) -> None:
    if _libc.ptrace(request, child, address, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace {request}: {os.strerror(code)}")
