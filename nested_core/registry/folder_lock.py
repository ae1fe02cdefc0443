"""The lock of a registry folder: one writer at a time, or readers, through its file `.lock`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nested_core.errors import DamagedError
from nested_core.storage.lock_file import LockFile, exclusive_lock, shared_lock

LOCK_NAME = ".lock"


@contextmanager
def exclusive(folder: Path) -> Iterator[LockFile]:
    """Hold `folder` alone. ConfigError if it cannot be written, or its disk has no locks.

    Damage that the block meets after the lock file was removed is told as that: the next process
    locks a new file, writes at the same time, and removes what it takes for leftovers.
    """
    with exclusive_lock(folder / LOCK_NAME) as lock:
        _refresh_listing(folder)
        try:
            yield lock
        except (DamagedError, FileNotFoundError):
            lock.require_current()
            raise


@contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Keep writers out of `folder` while reading; if it has no lock file, only read."""
    with shared_lock(folder / LOCK_NAME):
        _refresh_listing(folder)
        yield


def _refresh_listing(folder: Path) -> None:
    """Make changes by other machines visible, if the folder is on the network.

    An NFS client may answer from names that it saw up to a minute ago, the link's among them.
    Opening a directory makes it ask the server (Linux: fs/nfs/dir.c, nfs_lookup_verify_inode).
    """
    for directory in (folder, folder / "versions"):
        with suppress(FileNotFoundError):
            os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
