"""Lock files (flock): one process at a time works in a folder or on a device.

The operating system releases a lock when its process ends, so a killed process blocks nobody. A
lock belongs to a file, not to its name: if somebody removes the file, the next process creates and
locks another one. So a process that has locked a file checks that this file is still the one at the
path, and checks again (`require_still_at_path`) just before each write that takes effect.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nested_core.errors import ConfigError, DamagedError, NestedTuneError
from nested_core.process.command_parent import command_process
from nested_core.storage.atomic import closing_descriptor
from nested_core.storage.untrusted_files import file_type

# A link is refused, a pipe not waited for, and a program that is started does not keep the lock.
OPEN_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
HOLDER_BYTES = 32  # more than any process id has

NOT_REGULAR_ERRNOS = {errno.ELOOP, errno.EISDIR, errno.ENXIO}
NOT_WRITABLE_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS}
NO_LOCKS_ERRNOS = {errno.ENOLCK, errno.EOPNOTSUPP}

OnBusy = Callable[[], None]


@dataclass(frozen=True)
class LockFile:
    """A lock file that this process has locked: its path and open descriptor."""

    path: Path
    descriptor: int

    def is_still_at_path(self) -> bool:
        """Return whether nobody has removed or replaced the locked file."""
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(os.fstat(self.descriptor), there)

    def require_still_at_path(self) -> None:
        """Raise DamagedError if the locked file was removed: another process may then lock too."""
        if not self.is_still_at_path():
            raise DamagedError(
                f"{self.path} was removed or replaced while this process had it locked: another "
                "process may be writing here. Nothing more is written. Find out what removes lock "
                "files (a cleaner of old files?), then run the command again."
            )

    def write_holder(self) -> None:
        """Write this process's id into the lock file, for those who find it locked."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, str(command_process()).encode(), 0)


@contextmanager
def exclusive_lock(
    path: Path, *, mode: int = 0o666, on_busy: OnBusy | None = None
) -> Iterator[LockFile]:
    """Lock a file for this process alone during the block; create the file if it is missing.

    on_busy: called each time that another process has the lock; it waits a while, or raises.
        Without it, wait as long as it takes.

    Raises DamagedError for anything but a regular file, ConfigError if the file cannot be created
    or its file system has no locks.
    """
    lock = _open_and_lock(path, os.O_RDWR | os.O_CREAT, mode, fcntl.LOCK_EX, on_busy)
    with closing_descriptor(lock.descriptor):
        yield lock


@contextmanager
def shared_lock(path: Path, *, on_busy: OnBusy | None = None) -> Iterator[LockFile | None]:
    """Hold a shared lock during the block: other readers may too, a writer may not.

    Yields None, without a lock, for a file that is missing or that this user may not read.

    on_busy: called each time that a writer has the lock; it waits a while, or raises.
    """
    lock = None
    with suppress(FileNotFoundError, PermissionError):
        lock = _open_and_lock(path, os.O_RDONLY, 0, fcntl.LOCK_SH, on_busy)
    try:
        yield lock
    finally:
        if lock is not None:
            os.close(lock.descriptor)


@contextmanager
def exclusive_lock_with_holder_id(
    path: Path, *, mode: int = 0o666, on_busy: OnBusy | None = None
) -> Iterator[LockFile]:
    """Lock a file as `exclusive_lock` does, and write this process's id into it.

    If the file has a second hard link, a new file replaces it, so the other link's content stays.
    """
    while True:
        with exclusive_lock(path, mode=mode, on_busy=on_busy) as lock:
            if os.fstat(lock.descriptor).st_nlink > 1:
                os.unlink(path)
                continue
            lock.write_holder()
            yield lock
            return


def lock_open_file(descriptor: int, path: Path) -> None:
    """Lock an open file until it is closed; ConfigError if its file system has no locks.

    For a file that is never removed, so the path need not be checked again.
    """
    _try_flock(descriptor, path, fcntl.LOCK_EX)


def open_lock_held_by_parent(path: Path) -> LockFile | None:
    """Open, without locking it, a lock file that a parent process has locked for this one.

    None if the file is missing. The descriptor stays open, so its identity can be checked later.
    """
    try:
        return LockFile(path, _open_lock_file(path, os.O_RDONLY, 0))
    except FileNotFoundError:
        return None


def read_holder(path: Path) -> int | None:
    """Return the id of the process that has locked a file; None if it is not locked.

    Returns 0 if the file does not say which process.
    """

    def stop() -> None:
        """Raise BlockingIOError instead of waiting for the lock."""
        raise BlockingIOError

    try:
        with shared_lock(path, on_busy=stop):
            return None
    except BlockingIOError:
        with closing_descriptor(_open_lock_file(path, os.O_RDONLY, 0)) as descriptor:
            written = os.read(descriptor, HOLDER_BYTES)
        return int(written) if written.isdigit() else 0


def _open_and_lock(
    path: Path, flags: int, mode: int, operation: int, on_busy: OnBusy | None
) -> LockFile:
    """Open and lock the file at `path`; repeat if it was replaced in between.

    flags, mode: as in os.open. operation: as in fcntl.flock.
    """
    while True:
        lock = LockFile(path, _open_lock_file(path, flags, mode))
        try:
            _wait_for_lock(lock, operation, on_busy)
            if lock.is_still_at_path():
                return lock
        except BaseException:
            os.close(lock.descriptor)
            raise
        os.close(lock.descriptor)


def _open_lock_file(path: Path, flags: int, mode: int) -> int:
    """Open a lock file and return its descriptor.

    flags, mode: as in os.open.

    Raises DamagedError if it is a link, a folder or another special file, ConfigError if it cannot
    be created for lack of permission, and any other OSError as it is.
    """
    try:
        descriptor = os.open(path, flags | OPEN_SAFELY, mode)
    except OSError as error:
        if error.errno in NOT_REGULAR_ERRNOS:
            raise _not_regular(path) from error
        if flags & os.O_CREAT and error.errno in NOT_WRITABLE_ERRNOS:
            raise ConfigError(
                f"{path.parent} cannot be written ({error.strerror}). Expected a folder in which "
                f"you may create files: check its owner, its permissions and how it is mounted."
            ) from error
        raise
    # Some special files can be opened, and are only known now
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


def _wait_for_lock(lock: LockFile, operation: int, on_busy: OnBusy | None) -> None:
    """Lock an open file, calling `on_busy` while another process has the lock."""
    while True:
        try:
            return _try_flock(
                lock.descriptor, lock.path, operation | (fcntl.LOCK_NB if on_busy else 0)
            )
        except BlockingIOError:
            if on_busy is None:
                raise
            on_busy()


def _try_flock(descriptor: int, path: Path, operation: int) -> None:
    """Call flock; ConfigError if the file system has no locks.

    operation: as in fcntl.flock.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS_ERRNOS:
            raise
        raise ConfigError(
            f"{path} cannot be locked ({error.strerror}): its file system has no file locks, "
            "and several processes could overwrite one another's work. Mount it with locks, or "
            "move the folder."
        ) from error


def _not_regular(path: Path) -> NestedTuneError:
    """Build the error for a lock file that is not a regular file."""
    names = {"link": "a symbolic link", "directory": "a directory"}
    name = names.get(file_type(path), "no regular file")
    return DamagedError(
        f"{path} is {name}. Expected the file of a lock. Remove it: a lock's file holds "
        "nothing that is needed, and is made again."
    )
