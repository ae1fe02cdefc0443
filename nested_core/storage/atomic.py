"""Atomic writes: a crash leaves the old content or the new, never something in between.

Nothing is written in place: a temporary name beside the target, fsync, rename, fsync of the parent.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError, DirectoryInsteadOfFileError, shorten

TEMPORARY_PREFIX = ".tmp-"
RETIRED_PREFIX = ".old-"
MAX_NAME_BYTES = 255  # of a file system's names; a temporary one fits wherever its target does

Confirm = Callable[[], None]  # raises where what is being written may no longer take effect


def sync_descriptor(descriptor: int) -> None:
    """Force a file's bytes onto the disk, with `F_FULLFSYNC` where macOS needs it (man fsync)."""
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is not None:
        try:
            fcntl.fcntl(descriptor, full_sync)
            return
        except OSError:  # network mounts do not support it
            pass
    os.fsync(descriptor)


def sync_path(path: Path) -> None:
    """Sync one file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(target: Path) -> Path:
    """A new name in the target's folder, on the same file system, that no reader opens."""
    suffix = f"-{uuid.uuid4().hex[:8]}"
    kept = MAX_NAME_BYTES - len(TEMPORARY_PREFIX) - len(suffix)
    return target.parent / f"{TEMPORARY_PREFIX}{_shorten_name(target.name, kept)}{suffix}"


def _shorten_name(name: str, size: int) -> str:
    """A name's first characters, as many as fit into `size` bytes."""
    while len(os.fsencode(name)) > size:
        name = name[:-1]
    return name


@contextmanager
def naming_target_in_errors(target: Path, temporary: Path) -> Iterator[None]:
    """Name the target in an error about its temporary file or folder, or about what is in that."""
    try:
        yield
    except IsADirectoryError as error:
        raise _is_a_directory(target) from error
    except OSError as error:
        name = os.fsdecode(error.filename or temporary)  # a write names no file
        if Path(name).is_relative_to(temporary):
            error.filename = str(target / Path(name).relative_to(temporary))
            error.filename2 = None
        raise


def _is_a_directory(path: Path) -> DirectoryInsteadOfFileError:
    return DirectoryInsteadOfFileError(
        f"{path} is a directory, and a file belongs there. Move it away, and give the command "
        f"again."
    )


def remove_file(path: Path) -> None:
    """Remove a file or a link, if there is one; DamagedError for a directory, which stays."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # IsADirectoryError on Linux, PermissionError on macOS
        if path.is_dir() and not path.is_symlink():
            raise _is_a_directory(path) from error
        raise


def write_bytes(
    target: Path, content: bytes | memoryview, *, confirm: Confirm | None = None
) -> None:
    """Replace `target` with `content`, atomically and durably.

    `confirm` is called just before the new content takes effect; what it raises leaves the old.
    """
    temporary = temporary_beside(target)
    with naming_target_in_errors(target, temporary):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                sync_descriptor(file.fileno())
            if confirm is not None:
                confirm()
            temporary.replace(target)
        except BaseException:
            with suppress(OSError):  # of a name too long there is none to remove
                temporary.unlink(missing_ok=True)
            raise
    sync_path(target.parent)


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spare space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def render_json(value: Any) -> bytes:
    """Readable JSON; NaN and infinity are refused with ValueError."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def finite_or_none(value: Any) -> Any:
    """The value with None for every float that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(target: Path, value: Any, *, confirm: Confirm | None = None) -> None:
    """Replace `target` with readable JSON, as `write_bytes` does."""
    write_bytes(target, render_json(value), confirm=confirm)


@contextmanager
def new_directory(
    target: Path, *, replace: bool = False, confirm: Confirm | None = None
) -> Iterator[Path]:
    """Yield a temporary directory that becomes `target` when the block ends without an error.

    Every file written into it is synced first. With `replace`, a directory already at `target` is
    moved aside and removed once the new one stands; otherwise an existing target is an error.
    `confirm` is called just before the directory takes its place; what it raises leaves the old.
    """
    temporary = temporary_beside(target)
    with naming_target_in_errors(target, temporary):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _move_into_place(temporary, target, replace=replace, confirm=confirm)
        except BaseException:
            with suppress(OSError):
                _remove_path(temporary)
            raise


def _move_into_place(
    temporary: Path, target: Path, *, replace: bool, confirm: Confirm | None
) -> None:
    for path in (*temporary.rglob("*"), temporary):
        sync_path(path)
    if confirm is not None:
        confirm()
    retired = target.with_name(RETIRED_PREFIX + target.name)
    _restore_retired(retired)
    if not replace and target.exists():
        raise FileExistsError(errno.EEXIST, "It exists already", str(target))
    if target.exists():
        target.rename(retired)
    try:
        temporary.rename(target)
    except OSError:
        _restore_retired(retired)
        raise
    sync_path(target.parent)
    _remove_path(retired)


def remove_leftovers(folder: Path) -> None:
    """Remove the half-written files of a killed process, and restore directories it moved aside.

    A directory that was to be replaced gets its name back. Call only under the folder's lock.
    """
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        _remove_path(leftover)
    for retired in folder.glob(f"{RETIRED_PREFIX}*"):
        _restore_retired(retired)


def _restore_retired(retired: Path) -> None:
    """Give a retired directory its name back; remove it if the new one has the name."""
    target = retired.with_name(retired.name.removeprefix(RETIRED_PREFIX))
    if not retired.exists():
        return
    if target.exists():
        _remove_path(retired)
    else:
        retired.rename(target)


def _remove_path(path: Path) -> None:
    """Remove a file or folder, with what another process adds or removes meanwhile.

    One that lost its lock may still write there: it fails at its next file.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
    while path.is_dir() and not path.is_symlink():
        try:
            _make_removable(path)
            shutil.rmtree(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise


def _make_removable(folder: Path) -> None:
    """Let the owner remove what is in a folder that was made read-only, as versions are."""
    for directory, _, _ in os.walk(folder):
        mode = stat.S_IMODE(os.lstat(directory).st_mode)
        if mode & stat.S_IRWXU != stat.S_IRWXU:
            with suppress(PermissionError):  # of another owner; removing says so
                os.chmod(directory, mode | stat.S_IRWXU)


def require_writable_place(path: Path, what: str, key: str) -> None:
    """Write and remove a file in `path`, or in the nearest folder above it that exists.

    Raises ConfigError, naming `what` was to be there and by which key, where that cannot be done.
    """
    folder = path
    while not folder.is_dir() and folder.parent != folder:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{shorten(repr(str(path)), 80)} cannot be {what}: nothing can be written in "
            f"{shorten(folder, 80)} ({error.strerror}). Check its owner, its permissions and how "
            f"it is mounted, or give another {key}."
        ) from error
