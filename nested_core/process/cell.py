"""A process that works on what somebody else made, with limits of memory and time.

A file of some kilobytes can let its reader take gigabytes, or never end: packed texts, a cell far
outside of the table, an array of a sparse file, a chat template that loops. And it can end the
reader, with its process. Here that ends a child process, and the parent says so in one paragraph.
"""

from __future__ import annotations

import errno
import os
import platform
import resource
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nested_core.errors import CellEnded, CellOutOfMemory, ChildFailed
from nested_core.process.child import NO_LIMITS, Child, Limits

IS_LINUX = platform.system() == "Linux"
BASE_BYTES = 256 * 2**20  # which a reader takes of a small file, its libraries included
BASE_SECONDS = 15.0  # of processor time
SECONDS_PER_BYTE = 3e-6  # more of them: a workbook of 100 MB takes a hundred
# What is mapped or reserved and not used; thread stacks alone are a gigabyte on many cores.
UNUSED_BYTES = 4 * 2**30
POLL_SECONDS = 0.01 if IS_LINUX else 0.25  # elsewhere a process is started for it
SLOWEST_POLL_SECONDS = 0.1
BYTES_PER_SECOND = 4e9  # by which a process can grow: the next look comes before it is at its limit
CLOCK_FACTOR = 20  # how much longer than its processor time an answer may take
MAX_ANSWER_BYTES = 2**28
SIGNALS_FROM_OUTSIDE = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}


@dataclass(frozen=True)
class Allowance:
    """What a process may take for an answer.

    memory_bytes: that it holds.
    seconds: of processor time, which the process itself or its kernel limits.
    clock_seconds: more than `seconds`, as the machine may be busy.
    """

    memory_bytes: int
    seconds: float
    clock_seconds: float

    @classmethod
    def for_file(cls, path: Path, bytes_per_byte: int) -> Self:
        """Return what the reader of a file may take, by what the file takes on disk.

        bytes_per_byte: memory for each byte of the file.
        """
        size = size_without_holes(path)
        seconds = BASE_SECONDS + SECONDS_PER_BYTE * size
        return cls(BASE_BYTES + bytes_per_byte * size, seconds, CLOCK_FACTOR * seconds)


class Cell(Child):
    """A process whose memory and time are limited while it works on an answer.

    The memory is what the process itself holds, without mapped files.

    allowance: for the next answer.
    """

    def __init__(
        self,
        function: str | Path,
        allowance: Allowance,
        *,
        environment: Mapping[str, str] | None = None,
        limits: Limits = NO_LIMITS,
    ) -> None:
        """Start a process that answers requests with a function, see `Child`.

        limits: of the whole process, which the kernel enforces.
        """
        self.allowance = allowance
        super().__init__(
            function, environment=environment, max_answer_bytes=MAX_ANSWER_BYTES, limits=limits
        )

    @classmethod
    def for_file(
        cls, function: str | Path, path: Path, *, bytes_per_byte: int, has_device: bool = False
    ) -> Self:
        """Start a process that reads one file, limited by what the file takes on disk.

        On Linux its address space is limited as well, for what one operation takes at once.

        bytes_per_byte: memory that the reader may take for each byte of the file.
        has_device: whether it may use a GPU, whose driver reserves more address space than there is
            memory; the address space is then not limited.
        """
        allowance = Allowance.for_file(path, bytes_per_byte)
        space = resource.RLIM_INFINITY if has_device else allowance.memory_bytes + UNUSED_BYTES
        return cls(function, allowance, limits=Limits(space, round(allowance.seconds)))

    def receive(self, seconds: float | None = None) -> Any:
        """Return the next answer, as `Child.receive`.

        Raises CellEnded if the process exceeds its limits, or is ended by what it works on.
        """
        allowed = self.allowance
        seconds = seconds or allowed.clock_seconds
        deadline = time.monotonic() + seconds
        try:
            wait = POLL_SECONDS
            while not self.has_answer(wait):
                room = allowed.memory_bytes - self._read_memory()
                if room < 0:
                    raise MemoryError
                wait = max(POLL_SECONDS, min(SLOWEST_POLL_SECONDS, room / BYTES_PER_SECOND))
                if time.monotonic() > deadline:
                    raise CellEnded(f"it took more than {seconds:.0f} seconds")
            return super().receive(max(1.0, deadline - time.monotonic()))
        except MemoryError:
            self._kill_and_wait()
            said = f"it took more than {allowed.memory_bytes / 1e6:,.0f} MB of memory"
            raise CellOutOfMemory(said) from None
        except ChildFailed as error:
            code = self.process.poll()
            self._kill_and_wait()
            if code in {-signal.SIGPROF, -signal.SIGXCPU}:
                said = f"it took more than {allowed.seconds:.0f} seconds of processor time"
                raise CellEnded(said) from None
            is_own_end = isinstance(error, CellEnded) or (
                code is not None and code < 0 and code not in SIGNALS_FROM_OUTSIDE
            )
            said = str(error).splitlines()[0]  # without its last output
            raise (CellEnded if is_own_end else ChildFailed)(said) from None

    def _kill_and_wait(self) -> None:
        """Kill the process, so that whoever asks next sees that it has ended."""
        self.kill()
        self.process.wait()

    def _read_memory(self) -> int:
        """Return the bytes of memory that the process holds; 0 if it has just ended."""
        with suppress(OSError, ValueError, subprocess.SubprocessError):
            return read_memory(self.process.pid)
        return 0


def limit_processor_time(seconds: float) -> None:
    """Have the kernel end this process (SIGPROF) when it takes so many seconds from now on.

    That ends a single long operation too, which no other thread of Python could interrupt. A timer
    counts by itself: RLIMIT_CPU counts ticks since the start, which on a busy machine are seconds
    away from what `time.process_time` says.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)


def size_without_holes(path: Path) -> int:
    """Return the bytes of a file that are no hole: less than its size for a sparse file.

    The blocks that it takes on disk say something else, where a file system compresses files or
    keeps a small one beside its name.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    size = end = 0
    try:
        while True:
            begin = os.lseek(file, end, os.SEEK_DATA)
            end = os.lseek(file, begin, os.SEEK_HOLE)
            size += end - begin
    except OSError as error:  # no more data, or a file system that tells of no holes
        return size if error.errno == errno.ENXIO else os.fstat(file).st_size
    finally:
        os.close(file)


def read_memory(pid: int) -> int:
    """Return the bytes of memory that a process holds; on Linux without mapped files."""
    if IS_LINUX:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text("ascii").split())
        return (resident - shared) * resource.getpagesize()
    return int(subprocess.check_output(["/bin/ps", "-o", "rss=", "-p", str(pid)])) * 1024
