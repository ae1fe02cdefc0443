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
def exclusive_folder_lock(folder: Path) -> Iterator[LockFile]:
    """Hold `folder` alone. ConfigError if it cannot be written, or its disk has no locks.

    Damage that the block meets after the lock file was removed is told as that: the next process
    locks a new file, writes at the same time, and removes what it takes for leftovers. So is a file
    of the folder that went away: then it was another process whose lock file was removed.
    """
    with exclusive_lock(folder / LOCK_NAME) as lock:
        _refresh_listing(folder)
        try:
            yield lock
        except (DamagedError, FileNotFoundError) as error:
            lock.require_still_at_path()
            if isinstance(error, FileNotFoundError) and _is_below(folder, error.filename):
                raise DamagedError(
                    f"{error.filename} went away while this process had {folder} locked: another "
                    f"process writes here whose lock file was removed or replaced. Nothing more is "
                    f"written; find out what removes lock files, then run the command again."
                ) from error
            raise


def _is_below(folder: Path, path: object) -> bool:
    return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder)


@contextmanager
def shared_folder_lock(folder: Path) -> Iterator[LockFile | None]:
    """Keep writers out of `folder` while reading; if it has no lock file, only read."""
    with shared_lock(folder / LOCK_NAME) as lock:
        _refresh_listing(folder)
        yield lock


def require_no_writes_meanwhile(folder: Path, lock: LockFile | None) -> None:
    """Raise DamagedError if somebody may have written while a reader thought `folder` locked.

    `lock` is what `shared_folder_lock` yielded: None where there was no lock file, which a writer
    may have made since. What was read is then no proof of damage.
    """
    if lock is not None:
        lock.require_still_at_path()
    elif (folder / LOCK_NAME).exists():
        raise DamagedError(
            f"{folder / LOCK_NAME} was made or replaced while this process read {folder}: another "
            "process may be writing here. Run the command again."
        )


def _refresh_listing(folder: Path) -> None:
    """Make changes by other machines visible, if the folder is on the network.

    An NFS client may answer from names that it saw up to a minute ago, the link's among them.
    Opening a directory makes it ask the server (Linux: fs/nfs/dir.c, nfs_lookup_verify_inode).
    """
    for directory in (folder, folder / "versions"):
        with suppress(FileNotFoundError):
            os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
