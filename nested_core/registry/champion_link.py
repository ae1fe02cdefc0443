"""The champion: a relative symbolic link to a version, replaced by one rename.

The next link is prepared beside it first, so that an interrupted change can be told from a link
that was moved by hand. A link to anywhere but versions/<digest> is refused.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from nested_core.errors import DamagedError
from nested_core.registry.name_folders import VERSIONS
from nested_core.storage.atomic import Confirm, sync_path
from nested_core.storage.strict_files import file_type

LINK_NAME = "champion"
PREPARED_NAME = ".champion-next"
TARGET_PATTERN = re.compile(rf"{VERSIONS}/([0-9a-f]{{64}})")


def read_link(folder: Path) -> str | None:
    """The version that `champion` points to, or None without a link; it may not exist.

    Raises DamagedError if it is no link or points anywhere else.
    """
    return _read_target(folder / LINK_NAME)


def read_prepared(folder: Path) -> str | None:
    """The version that an unfinished change was to make the champion."""
    try:
        return _read_target(folder / PREPARED_NAME)
    except DamagedError:
        return None


def prepare(folder: Path, version: str) -> None:
    """Put the next link beside the champion, durably; readers ignore it."""
    os.symlink(f"{VERSIONS}/{version}", folder / PREPARED_NAME)
    sync_path(folder)


def swap(folder: Path, *, confirm: Confirm) -> None:
    """Rename the prepared link to `champion`: a reader sees the old one or the new one.

    `confirm` is called just before, and raises where another process could be writing.
    """
    confirm()
    os.replace(folder / PREPARED_NAME, folder / LINK_NAME)
    sync_path(folder)


def discard_prepared(folder: Path) -> None:
    """Remove a prepared link that never became the champion."""
    path = folder / PREPARED_NAME
    if file_type(path) != "missing":
        path.unlink()
        sync_path(folder)


def _read_target(path: Path) -> str | None:
    try:
        target = os.readlink(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise DamagedError(_misplaced(path, "is not a symbolic link")) from None
    match = TARGET_PATTERN.fullmatch(target)
    if match is None:
        raise DamagedError(_misplaced(path, f"points to {target!r:.120}"))
    return match[1]


def _misplaced(path: Path, what: str) -> str:
    return (
        f"{path} {what}. Expected a relative link to {VERSIONS}/<digest>. Remove it and promote a "
        "version again; do not copy a registry in a way that follows links."
    )
