"""A cache of the SHA-256 of large files, keyed by device, inode, size and change time.

The kernel sets the change time (ctime) at each write and at each change of the times, so a program
without root's rights cannot reset it. A hash is cached only if the file had been unchanged for some
seconds, because two writes within one tick of the clock have one change time. Corruption below the
file system, such as a disk that loses bits, is not noticed while the entry is valid.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from nested_core.errors import ConfigError, DamagedError
from nested_core.storage.atomic import write_bytes
from nested_core.storage.untrusted_files import open_regular, read_start, regular_sha256
from nested_core.storage.user_cache import UserCache, cache_folder

MIN_FILE_AGE_TO_KEEP_HASH = 2.0
HASH_PATTERN = re.compile("[0-9a-f]{64}")
MAX_ENTRY_BYTES = 64
MAX_THREADS = 8
SIGNAL_SECONDS = 0.2  # after which a signal is heard at the latest


def cached_sha256(paths: Sequence[Path], *, max_age: float = math.inf) -> list[str]:
    """Return the SHA-256 of each file, from the cache if the file is unchanged; links are followed.

    max_age: seconds after which a cached hash is computed again.

    Files that are not cached are hashed in threads, which a signal that ends the process leaves
    behind: a file may have a terabyte, or be a hole of that size. An unusable cache only costs
    time. Raises DamagedError for anything but a regular file, and OSError.
    """
    cache: UserCache | None = None
    with suppress(ConfigError, OSError, RuntimeError):  # RuntimeError: there is no home
        folder = cache_folder() / "hashes"
        user_cache = UserCache(folder, "hashes", "pass another base model as the one of a training")
        user_cache.require_usable()
        cache = user_cache
    with ThreadPool(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        hashes = pool.map_async(partial(_hash_file, cache=cache, max_age=max_age), paths, 1)
        while not hashes.ready():  # polars has SIGINT restart a wait without end
            hashes.wait(SIGNAL_SECONDS)
        return hashes.get()


def _hash_file(path: Path, cache: UserCache | None, max_age: float) -> str:
    """Return a file's SHA-256 from the cache, else compute it and cache it.

    The cache key is the file's identity (device, inode, size, times). The hash is cached only if
    the file was last changed more than MIN_FILE_AGE_TO_KEEP_HASH seconds ago, and has the same
    identity after it was read.

    cache: None computes the hash.
    max_age: the age in seconds up to which a cached hash counts.
    """
    identity = _file_identity(path)
    entry = None if cache is None else cache.entry(identity)
    cached = None if entry is None else _read_entry(entry, max_age)
    if cached is not None:
        return cached
    is_old = time.time() - identity["ctime_ns"] / 1e9 > MIN_FILE_AGE_TO_KEEP_HASH
    digest = regular_sha256(path, follow_links=True)
    if cache is not None and entry is not None and is_old and _file_identity(path) == identity:
        with suppress(OSError):
            cache.remove_unused()
            write_bytes(entry, digest.encode())
    return digest


def _file_identity(path: Path) -> dict[str, int]:
    """Return what changes whenever a file is changed or replaced: inode, size and times."""
    status = path.stat()
    return {
        "device": status.st_dev,
        "inode": status.st_ino,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _read_entry(entry: Path, max_age: float) -> str | None:
    """Read a cached hash; None if it is too old, invalid or another user's file.

    max_age: the age in seconds up to which it counts.
    """
    try:
        with open_regular(entry, MAX_ENTRY_BYTES) as (file, size):
            status = os.fstat(file.fileno())
            if status.st_uid != os.getuid() or time.time() - status.st_mtime > max_age:
                return None
            digest = read_start(file, size, entry).decode("ascii")
    except (DamagedError, OSError, ValueError):
        return None
    return digest if HASH_PATTERN.fullmatch(digest) else None
