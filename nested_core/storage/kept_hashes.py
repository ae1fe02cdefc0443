"""SHA-256 of large files, kept by device, inode, size and change time: the second look is a stat.

The change time (ctime) is set by the kernel at each write and at each change of the times, so that
a program without root's rights cannot give it back. A hash is kept only if the file had been left
alone for some seconds, because two writes within one tick of the clock have one change time. What
changes below the file system, such as a disk that loses bits, is not seen until the entry goes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from nested_core.errors import ConfigError, DamagedError
from nested_core.storage.atomic import write_bytes
from nested_core.storage.compiled_kernels import cache_folder
from nested_core.storage.private_folder import make_folder_only_user_may_write
from nested_core.storage.strict_files import open_regular, parse_json, read_start, regular_sha256

FOLDER_NAME = "hashes"
MIN_FILE_AGE_TO_KEEP_HASH = 2.0
MAX_ENTRY_BYTES = 4096
MAX_THREADS = 8


def cached_sha256(paths: Sequence[Path], *, max_age: float = math.inf) -> list[str]:
    """SHA-256 of each file, hashed in threads where it is not known; links are followed.

    What was hashed more than `max_age` seconds ago is hashed again. A cache that cannot be read or
    written, or that others may write to, only costs time. Raises DamagedError for what is no
    regular file, and OSError.
    """
    folder = _private_cache_folder()
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda path: _hash_file(path, folder, max_age), paths))


def _hash_file(path: Path, folder: Path | None, max_age: float) -> str:
    before = _file_identity(path)
    entry = None if folder is None else folder / f"{before['device']:x}-{before['inode']:x}.json"
    known = None if entry is None else _read_entry(entry, before, max_age)
    if known is not None:
        return known
    is_settled = time.time() - before["ctime_ns"] / 1e9 > MIN_FILE_AGE_TO_KEEP_HASH
    digest = regular_sha256(path, follow_links=True)
    if entry is not None and is_settled and _file_identity(path) == before:
        with suppress(OSError):
            write_bytes(entry, json.dumps(before | {"sha256": digest}).encode())
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


def _read_entry(entry: Path, identity: dict[str, int], max_age: float) -> str | None:
    """The hash in an entry of this user's about the file as it is now; None for any other."""
    try:
        with open_regular(entry, MAX_ENTRY_BYTES) as (file, size):
            status = os.fstat(file.fileno())
            if status.st_uid != os.getuid() or time.time() - status.st_mtime > max_age:
                return None
            fields = parse_json(read_start(file, size, entry))
    except (DamagedError, OSError, ValueError):
        return None
    if not isinstance(fields, dict) or not isinstance(fields.get("sha256"), str):
        return None
    digest: str = fields["sha256"]
    return digest if fields == identity | {"sha256": digest} else None


def _private_cache_folder() -> Path | None:
    """The folder of the entries, made if it is missing; None if it cannot be used safely."""
    try:
        folder = cache_folder() / FOLDER_NAME
        make_folder_only_user_may_write(
            folder, "hashes", "pass another base model as the one of a training"
        )
    except (ConfigError, OSError, RuntimeError):
        return None
    return folder
