"""Files of unknown origin read whole and once, as bytes or as JSON.

Refuses what is no regular file (a pipe would wait, a device would never end) and what is too large.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nested_core.backend import main_memory_bytes
from nested_core.errors import DamagedError
from nested_core.storage.strict_json import parse_json

UNREADABLE = (errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.ENXIO)


@contextmanager
def open_regular(path: Path, limit: int | None = None) -> Iterator[tuple[Any, int]]:
    """Open a regular file and tell its size; at most `limit` bytes, else this machine's memory."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing.") from None
    except NotADirectoryError:
        raise DamagedError(f"{path} is not a file.") from None
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise  # it may pass: whoever called can try again
        raise DamagedError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError(f"{path} is not a file.")
        most = main_memory_bytes() if limit is None else limit
        if found.st_size > most:
            raise DamagedError(f"{path} is larger than {most} bytes.")
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            yield file, found.st_size
    finally:
        os.close(descriptor)


def read_start(file: Any, size: int, path: Path) -> bytes:
    """The first `size` bytes of an open file; DamagedError where it has become shorter."""
    file.seek(0)
    content: bytes = file.read(size)
    while len(content) < size:  # one call reads at most 2 GiB on Linux
        more = file.read(size - len(content))
        if not more:
            raise DamagedError(f"{path} became shorter while it was read.")
        content += more
    return content


def read_regular(path: Path, limit: int | None = None) -> bytes:
    """All bytes of a regular file, of at most `limit`; DamagedError where it is not one."""
    with open_regular(path, limit) as (file, size):
        return read_start(file, size, path)


def read_json(path: Path, limit: int | None) -> Any:
    """The value of a JSON file; DamagedError if it is missing, too large or not strict JSON.

    `limit` is in bytes; without one, as for a file that we wrote, this machine's memory is it.
    """
    try:
        return parse_json(read_regular(path, limit))
    except ValueError as error:
        raise DamagedError(f"{path} is not valid JSON: {error}.") from error


def regular_sha256(path: Path) -> str:
    """SHA-256 of a regular file's bytes, read in pieces; DamagedError if it is not one."""
    with open_regular(path) as (file, _):
        return hashlib.file_digest(file, "sha256").hexdigest()
