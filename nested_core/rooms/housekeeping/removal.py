"""Whether a folder may be removed; every command that removes folders asks here.

Runs, versions and exports each have a command that knows which of them nobody needs any more. A
foreign file beside those of nested-tune keeps the folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from nested_core.storage.atomic import RETIRED_PREFIX, TEMPORARY_PREFIX

# What a killed writer, a file system on the network, and a desktop leave in any folder.
LEFTOVER_BEGINNINGS = (TEMPORARY_PREFIX, RETIRED_PREFIX, ".nfs")
DESKTOP_FILE = ".DS_Store"
MOUNT_TABLE = Path("/proc/self/mountinfo")  # of Linux: it has bind mounts too (man 5 proc)
MOUNT_POINT_COLUMN = 4


def find_reason_to_keep(path: Path, is_written_by_us: Callable[[str], object]) -> str | None:
    """Return why a folder or file must not be removed; None if it may be removed.

    It must stay if it is a link, if something is mounted at it or in it, or if it holds a link or a
    foreign file.

    is_written_by_us: decides about each file, given its path in the folder with `/`, or the name of
        a single file; a foreign file is one that it denies.

    Raises OSError for a folder that cannot be read.
    """
    if path.is_symlink():
        return f"it is a link to {os.readlink(path)}, and no link is followed to remove"
    top = os.path.realpath(path)
    mounts = _read_mount_points()
    if top in mounts or os.path.ismount(top):
        return "something is mounted at it"
    if os.path.isfile(top):
        return None if is_written_by_us(path.name) else "nested-tune did not write it"
    for folder, folders, files in os.walk(top, onerror=_raise):
        for inside in (os.path.join(folder, name) for name in sorted([*folders, *files])):
            name = os.path.relpath(inside, top)
            if inside in mounts or os.path.ismount(inside):
                return f"something is mounted at {name} in it"
            *_, last = parts = name.split(os.sep)
            # Leftovers of killed writers, files that a desktop makes, and folders do not count
            is_leftover = any(part.startswith(LEFTOVER_BEGINNINGS) for part in parts)
            counts_not = is_leftover or last == DESKTOP_FILE or os.path.isdir(inside)
            if os.path.islink(inside) or not (counts_not or is_written_by_us(name)):
                return f"nested-tune did not write {name} in it"
    return None


def _raise(error: OSError) -> NoReturn:
    """Raise an error that os.walk would otherwise ignore."""
    raise error


def _read_mount_points() -> set[str]:
    """Return the paths of all mount points; empty without Linux's table of mounts."""
    try:
        lines = MOUNT_TABLE.read_bytes().splitlines()
    except FileNotFoundError:
        return set()
    escaped = (line.split()[MOUNT_POINT_COLUMN] for line in lines)
    return {
        os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), path))
        for path in escaped
    }


def size_on_disk(path: Path) -> int:
    """Return the size in bytes of a file, or of all files below a folder.

    Links count with their own size; files that vanish meanwhile count 0.
    """
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    total = 0
    for file in paths or [str(path)]:
        with suppress(OSError):
            total += os.lstat(file).st_size
    return total
