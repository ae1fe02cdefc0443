"""Writing so that a crash leaves the old content or the new, never something in between.

Nothing is written in place: a temporary name beside the target, fsync, rename, fsync of the parent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"


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
    """A fresh name in the target's folder, on the same file system, that no reader looks at."""
    return target.parent / f"{TEMPORARY_PREFIX}{target.name}-{uuid.uuid4().hex[:8]}"


def write_bytes(target: Path, content: bytes) -> None:
    """Replace `target` with `content`, atomically and durably."""
    temporary = temporary_beside(target)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            sync_descriptor(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_path(target.parent)


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spare space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def render_json(value: Any) -> bytes:
    """Readable JSON; NaN and infinity are refused with ValueError."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(target: Path, value: Any) -> None:
    """Replace `target` with readable JSON."""
    write_bytes(target, render_json(value))


@contextmanager
def new_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes `target` when the block ends without an error.

    Every file written into it is synced first. With `replace`, a directory already at `target` is
    moved aside and removed once the new one stands; otherwise an existing target is an error.
    """
    temporary = temporary_beside(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _publish(temporary, target, replace=replace)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(temporary: Path, target: Path, *, replace: bool) -> None:
    for path in (*temporary.rglob("*"), temporary):
        sync_path(path)
    retired = temporary_beside(target) if replace and target.exists() else None
    if retired is not None:
        target.rename(retired)
    temporary.rename(target)
    sync_path(target.parent)
    if retired is not None:
        shutil.rmtree(retired)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`; call only under its lock."""
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
