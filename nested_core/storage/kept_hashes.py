"""SHA-256 of large files, kept by device, inode, size and change time: the second look is a stat.

The change time (ctime) is set by the kernel at each write and at each change of the times, so that
a program without root's rights cannot give it back. A hash is kept only if the file had been left
alone for some seconds, because two writes within one tick of the clock have one change time. What
changes below the file system, such as a disk that loses bits, is not seen until the entry goes.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from nested_core.errors import ConfigError, DamagedError
from nested_core.storage.atomic import write_bytes
from nested_core.storage.untrusted_files import open_regular, read_start, regular_sha256
from nested_core.storage.user_cache import UserCache, cache_folder

MIN_FILE_AGE_TO_KEEP_HASH = 2.0
HASH_PATTERN = re.compile("[0-9a-f]{64}")
MAX_ENTRY_BYTES = 64
MAX_THREADS = 8


def cached_sha256(paths: Sequence[Path], *, max_age: float = math.inf) -> list[str]:
    """SHA-256 of each file, hashed in threads where it is not known; links are followed.

    What was hashed more than `max_age` seconds ago is hashed again. A cache that cannot be read or
    written, or that others may write to, only costs time. Raises DamagedError for what is no
    regular file, and OSError.
    """
    cache: UserCache | None = None
    with suppress(ConfigError, OSError, RuntimeError):  # RuntimeError: there is no home
        folder = cache_folder() / "hashes"
        danger = "pass another base model as the one of a training"
        user_cache = UserCache(folder, "hashes", danger)
        user_cache.require_usable()
        cache = user_cache
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda path: _hash_file(path, cache, max_age), paths))


def _hash_file(path: Path, cache: UserCache | None, max_age: float) -> str:
    before = _file_identity(path)
    entry = None if cache is None else cache.entry(before)
    known = None if entry is None else _read_entry(entry, max_age)
    if known is not None:
        return known
    is_settled = time.time() - before["ctime_ns"] / 1e9 > MIN_FILE_AGE_TO_KEEP_HASH
    digest = regular_sha256(path, follow_links=True)
    if cache is not None and entry is not None and is_settled and _file_identity(path) == before:
        with suppress(OSError):
            cache.remove_unused()
            write_bytes(entry, digest.encode())
    return digest


def _file_identity(path: Path) -> dict[str, int]:
    """What tells a file that was changed or replaced from what it was."""
    status = path.stat()
    return {
        "device": status.st_dev,
        "inode": status.st_ino,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _read_entry(entry: Path, max_age: float) -> str | None:
    """The hash in an entry of this user's; None for any other."""
    try:
        with open_regular(entry, MAX_ENTRY_BYTES) as (file, size):
            status = os.fstat(file.fileno())
            if status.st_uid != os.getuid() or time.time() - status.st_mtime > max_age:
                return None
            digest = read_start(file, size, entry).decode("ascii")
    except (DamagedError, OSError, ValueError):
        return None
    return digest if HASH_PATTERN.fullmatch(digest) else None
