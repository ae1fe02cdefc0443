"""The lock of a registry folder: one writer at a time, through flock on the file `.lock`.

Callers wait for as long as it takes. The lock ends with its process, so that a killed process
blocks nobody.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nested_core.errors import ConfigError, DamagedError, NestedTuneError

LOCK_NAME = ".lock"
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe in the lock's place would be waited for
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP}


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` alone. ConfigError if it cannot be written, or its disk has no locks."""
    path = folder / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | SAFELY, 0o666)
    except OSError as error:
        raise _explain(error, path) from error
    try:
        _lock(descriptor, fcntl.LOCK_EX, path)
        _refresh_listing(folder)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Keep writers out of `folder` while reading; if it has no lock file, only read."""
    path = folder / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | SAFELY)
    except (FileNotFoundError, PermissionError):
        descriptor = None
    except OSError as error:
        raise _explain(error, path) from error
    try:
        if descriptor is not None:
            _lock(descriptor, fcntl.LOCK_SH, path)
        _refresh_listing(folder)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _refresh_listing(folder: Path) -> None:
    """Make changes by other machines visible, if the folder is on the network.

    An NFS client may answer from names that it saw up to a minute ago, the link's among them.
    Opening a directory makes it ask the server (Linux: fs/nfs/dir.c, nfs_lookup_verify_inode).
    """
    for directory in (folder, folder / "versions"):
        with suppress(FileNotFoundError):
            os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))


def _lock(descriptor: int, operation: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise DamagedError(f"{path} is no regular file. Remove it: it holds nothing.")
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        raise _explain(error, path) from error


def _explain(error: OSError, path: Path) -> NestedTuneError | OSError:
    if error.errno == errno.ELOOP:
        return DamagedError(f"{path} is a symbolic link; a registry has none but `champion`.")
    if error.errno == errno.EISDIR:
        return DamagedError(
            f"{path} is a directory. Remove it: it is the place of the lock's file."
        )
    if error.errno in NOT_WRITABLE:
        return ConfigError(
            f"{path.parent} cannot be written ({error.strerror}). Expected a folder in which you "
            "may create files: check its owner, its permissions and how it is mounted."
        )
    if error.errno in NO_LOCKS:
        return ConfigError(
            f"{path} cannot be locked ({error.strerror}): its file system has no file locks, and "
            "several promoters could overwrite one another. Mount it with locks, or move it."
        )
    return error
