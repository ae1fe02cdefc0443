"""A process that reads a file of somebody else's, with limits of memory and time by its size.

A file of some kilobytes can let its reader take gigabytes, or never end: packed texts, a cell far
outside of the table, an array of a sparse file. And it can end the reader, with its process. Here
that ends a child process, and the parent says so in one paragraph.
"""

from __future__ import annotations

import platform
import resource
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from nested_core.errors import ChildFailed
from nested_core.process.child import Child, Limits

IS_LINUX = platform.system() == "Linux"
BASE_BYTES = 256 * 2**20  # which a reader takes of a small file, its libraries included
BASE_SECONDS = 15.0  # of processor time
SECONDS_PER_BYTE = 3e-6  # more of them: a workbook of 100 MB takes a hundred
# What is mapped or reserved and not used; thread stacks alone are a gigabyte on many cores.
UNUSED_BYTES = 4 * 2**30
POLL_SECONDS = 0.01 if IS_LINUX else 0.25  # elsewhere a process is started for it
CLOCK_FACTOR = 20  # how much longer than its processor time an answer may take, on a busy machine
MAX_ANSWER_BYTES = 2**28


class Cell(Child):
    """A process whose memory and processor time are limited by the size of the file that it reads.

    The memory is what the process itself holds, without mapped files. On Linux its address space is
    limited as well, for what one operation takes at once.
    """

    def __init__(
        self, function: str | Path, path: Path, *, bytes_per_byte: int, has_device: bool = False
    ) -> None:
        """Start a process that answers requests on a file with a function, see `Child`.

        bytes_per_byte: memory that the reader may take for each byte of the file.
        has_device: whether it may use a GPU, whose driver reserves more address space than there is
            memory; the address space is then not limited.
        """
        size = size_on_disk(path)
        self.memory_bytes = BASE_BYTES + bytes_per_byte * size
        self.seconds = BASE_SECONDS + SECONDS_PER_BYTE * size
        self._is_too_large = False
        self._has_ended = threading.Event()
        space = resource.RLIM_INFINITY if has_device else self.memory_bytes + UNUSED_BYTES
        limits = Limits(space, round(self.seconds))
        super().__init__(function, max_answer_bytes=MAX_ANSWER_BYTES, limits=limits)
        self._watcher = threading.Thread(target=self._watch, name="memory limit", daemon=True)
        self._watcher.start()

    def ask(self, request: object, seconds: float | None = None) -> Any:
        """Return the answer to a request, as `Child.ask`; ChildFailed names the limit exceeded."""
        try:
            return super().ask(request, seconds or CLOCK_FACTOR * self.seconds)
        except (ChildFailed, MemoryError) as error:
            if self._is_too_large or isinstance(error, MemoryError):
                said = f"it took more than {self.memory_bytes / 1e6:,.0f} MB of memory"
            elif self.process.poll() == -signal.SIGXCPU:
                said = f"it took more than {self.seconds:.0f} seconds of processor time"
            else:
                said = str(error).splitlines()[0]  # without its last output
            raise ChildFailed(said) from None

    def end(self) -> None:
        """Kill the process, and end the thread that watches it."""
        self._has_ended.set()
        self._watcher.join()
        super().end()

    def _watch(self) -> None:
        """Kill the process when it holds more memory than it may."""
        while not self._has_ended.wait(POLL_SECONDS) and self.process.returncode is None:
            with suppress(OSError, ValueError, subprocess.SubprocessError):  # it has just ended
                if read_memory(self.process.pid) > self.memory_bytes:
                    self._is_too_large = True
                    self.kill()
                    return


def size_on_disk(path: Path) -> int:
    """Return the bytes that a file takes on disk, at most its size: less for a sparse file."""
    status = path.stat()
    return min(status.st_size, 512 * status.st_blocks) or status.st_size


def read_memory(pid: int) -> int:
    """Return the bytes of memory that a process holds; on Linux without mapped files."""
    if IS_LINUX:
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text("ascii").split())
        return (resident - shared) * resource.getpagesize()
    return int(subprocess.check_output(["/bin/ps", "-o", "rss=", "-p", str(pid)])) * 1024
