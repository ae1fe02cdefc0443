"""Atomic writes: a crash leaves the old content or the new, never a mixture.

Every write goes to a temporary name beside the target: write, fsync, rename, fsync the parent.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
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

Content = bytes | memoryview | Iterator[bytes]
Confirm = Callable[[], None]  # raises where what is being written may no longer take effect


def sync_descriptor(descriptor: int) -> None:
    """Force a file's bytes to disk, with `F_FULLFSYNC` on macOS (man fsync), else fsync."""
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is not None:
        try:
            fcntl.fcntl(descriptor, full_sync)
            return
        except OSError:  # network mounts do not support it
            pass
    os.fsync(descriptor)


@contextmanager
def closing_descriptor(descriptor: int) -> Iterator[int]:
    """Yield an open file's descriptor, and close it when the block ends."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_path(path: Path) -> None:
    """Force a file's or directory's content to disk."""
    with closing_descriptor(os.open(path, os.O_RDONLY)) as descriptor:
        sync_descriptor(descriptor)


def temporary_beside(target: Path) -> Path:
    """Return a new temporary name in the target's folder; such names are ignored by readers."""
    suffix = f"-{uuid.uuid4().hex[:8]}"
    kept = MAX_NAME_BYTES - len(TEMPORARY_PREFIX) - len(suffix)
    return target.parent / f"{TEMPORARY_PREFIX}{_shorten_name(target.name, kept)}{suffix}"


def _shorten_name(name: str, size: int) -> str:
    """Cut a file name to at most `size` bytes."""
    while len(os.fsencode(name)) > size:
        name = name[:-1]
    return name


@contextmanager
def naming_target_in_errors(target: Path, temporary: Path) -> Iterator[None]:
    """Replace, in an OSError of the block, the temporary file's name by the target's."""
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
    """Build the error for a directory where a file has to be written."""
    return DirectoryInsteadOfFileError(
        f"{path} is a directory, and a file belongs there. Move it away, and give the command "
        f"again."
    )


def remove_file(path: Path) -> None:
    """Remove a file or link if it exists; DamagedError for a directory, which is not removed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # IsADirectoryError on Linux, PermissionError on macOS
        if path.is_dir() and not path.is_symlink():
            raise _is_a_directory(path) from error
        raise


def private_mode(folder: Path) -> int:
    """Return the mode of a new folder for rows, in or beside `folder`: its owner's alone.

    Or its group's too, where the group may write in `folder` and not everybody, and what is made
    there is that group's.
    """
    found = folder.stat()
    is_shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) == stat.S_IWGRP
    is_same_group = found.st_mode & stat.S_ISGID or found.st_gid == os.getegid()
    return 0o770 if is_shared and is_same_group else 0o700


def write_page(target: Path, html: str) -> None:
    """Replace a page as `write_bytes` does; it shows rows, and so is private."""
    write_bytes(target, html.encode("utf-8", "replace"), mode=private_mode(target.parent) & 0o666)


def write_bytes(
    target: Path, content: Content, *, confirm: Confirm | None = None, mode: int = 0o666
) -> None:
    """Replace the content of a file atomically and durably: written beside it, synced and renamed.

    content: the bytes, or an iterator of their parts, which memory need not hold together.
    confirm: a last check by the caller, such as that it still holds a lock, called just before the
        rename; if it raises, the old file stays.
    mode: of the file, less the umask.
    """
    temporary = temporary_beside(target)
    with naming_target_in_errors(target, temporary):
        try:
            with open(temporary, "wb", opener=lambda path, how: os.open(path, how, mode)) as file:
                file.writelines(content if isinstance(content, Iterator) else (content,))
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


def canonical_json(value: object) -> bytes:
    """Encode as JSON with sorted keys and no spaces, so equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_json(value: object) -> str:
    """Return the SHA-256 of a value as canonical JSON, in hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_answer(text: str) -> str:
    """Return the 12 bits that gate.json keeps of an answer, to see whether it is gone.

    Other answers have them too, so that they confirm no guess.
    """
    return digest_json(text)[:3]


def render_json(value: object) -> bytes:
    """Encode as indented JSON; ValueError for NaN and infinity."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def finite_or_none(value: object) -> Any:
    """Replace, in nested lists and dictionaries, every float that is not finite by None."""
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(target: Path, value: object, *, confirm: Confirm | None = None) -> None:
    """Replace a file with indented JSON, atomically and durably.

    confirm: called just before the rename; if it raises, the old file stays.
    """
    write_bytes(target, render_json(value), confirm=confirm)


@contextmanager
def new_directory(
    target: Path, *, replace: bool = False, confirm: Confirm | None = None, mode: int = 0o777
) -> Iterator[Path]:
    """Yield a temporary directory that becomes `target` if the block ends without an error.

    replace: allow an existing `target`, which is moved aside and removed after the rename;
        otherwise it is a FileExistsError.
    confirm: called just before the rename; if it raises, the old directory stays.
    mode: of the directory, less the umask.

    All files are forced to disk before the rename.
    """
    temporary = temporary_beside(target)
    with naming_target_in_errors(target, temporary):
        temporary.mkdir(mode, parents=True)
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
    """Sync a temporary directory and rename it to `target`, moving an old one aside first.

    replace: whether `target` may exist; FileExistsError otherwise.
    confirm: a last check by the caller, such as that it still holds a lock, called before anything
        is moved; if it raises, everything stays as it was.

    A folder cannot be renamed over another one. So the old one is moved aside, and moved back if
    the rename fails, or by the next call if the process is killed in between.
    """
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
    """Remove temporary files of a killed process, and restore directories that it moved aside.

    Call only under the folder's lock.
    """
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        _remove_path(leftover)
    for retired in folder.glob(f"{RETIRED_PREFIX}*"):
        _restore_retired(retired)


def _restore_retired(retired: Path) -> None:
    """Rename a directory that was moved aside back to its name, or remove it if it was replaced."""
    target = retired.with_name(retired.name.removeprefix(RETIRED_PREFIX))
    if not retired.exists():
        return
    if target.exists():
        _remove_path(retired)
    else:
        retired.rename(target)


def _remove_path(path: Path) -> None:
    """Remove a file or folder, even if another process changes it meanwhile."""
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
    """Give the owner write permission on a read-only folder and those in it."""
    for directory, _, _ in os.walk(folder):
        mode = stat.S_IMODE(os.lstat(directory).st_mode)
        if mode & stat.S_IRWXU != stat.S_IRWXU:
            with suppress(PermissionError):  # of another owner; removing says so
                os.chmod(directory, mode | stat.S_IRWXU)


def require_writable_place(path: Path, what: str, key: str) -> None:
    """Raise ConfigError unless a file can be written at `path` or in its nearest existing parent.

    what, key: what is to be written there and which key names it, for the message.
    """
    folder = path
    while not os.path.exists(folder) and folder.parent != folder:
        folder = folder.parent
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # refuses a name that is too long
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{shorten(repr(str(path)), 80)} cannot be {what}: nothing can be written in "
            f"{shorten(folder, 80)} ({error.strerror}). Check its owner, its permissions and how "
            f"it is mounted, or give another {key}."
        ) from error
