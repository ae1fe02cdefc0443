"""The champion: a relative symbolic link to a version, replaced by one rename.

The next link is prepared beside it first, so that an interrupted change can be told from a link
that was moved by hand. A link to anywhere but versions/<digest> is refused.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from contextlib import suppress
from pathlib import Path

from nested_core.errors import DamagedError
from nested_core.registry.name_folders import VERSIONS_FOLDER_NAME
from nested_core.storage.atomic import Confirm, sync_path

LINK_NAME = "champion"
PREPARED_PREFIX = ".champion-next"
LINK_TARGET_PATTERN = re.compile(rf"{VERSIONS_FOLDER_NAME}/([0-9a-f]{{64}})")


def read_link(folder: Path) -> str | None:
    """The version that `champion` points to, or None without a link; it may not exist.

    Raises DamagedError if it is no link or points anywhere else.
    """
    return _read_target(folder / LINK_NAME)


def read_prepared_link(folder: Path) -> str | None:
    """The version that an unfinished change was to make the champion."""
    for path in _prepared_links(folder):
        with suppress(DamagedError):
            return _read_target(path)
    return None


def prepare_link(folder: Path, version: str) -> Path:
    """Put the next link beside the champion, durably; readers ignore it. Its name is new."""
    path = folder / f"{PREPARED_PREFIX}{uuid.uuid4().hex[:8]}"
    os.symlink(f"{VERSIONS_FOLDER_NAME}/{version}", path)
    sync_path(folder)
    return path


def swap_link(folder: Path, prepared: Path, *, confirm: Confirm) -> None:
    """Rename the prepared link to `champion`: a reader sees the old one or the new one.

    `confirm` is called just before, and raises where another process could be writing.
    """
    confirm()
    os.replace(prepared, folder / LINK_NAME)
    sync_path(folder)


def rename_links_of_other_writers(folder: Path) -> None:
    """Rename a link that another process prepared, so that `swap_link` fails there from now on."""
    for path in _prepared_links(folder):
        path.rename(folder / f"{PREPARED_PREFIX}{uuid.uuid4().hex[:8]}")


def discard_prepared_links(folder: Path) -> None:
    """Remove a prepared link that never became the champion."""
    for path in _prepared_links(folder):
        path.unlink()
        sync_path(folder)


def _prepared_links(folder: Path) -> list[Path]:
    return [folder / name for name in os.listdir(folder) if name.startswith(PREPARED_PREFIX)]


def _read_target(path: Path) -> str | None:
    try:
        target = os.readlink(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise DamagedError(_describe_wrong_link(path, "is not a symbolic link")) from None
    match = LINK_TARGET_PATTERN.fullmatch(target)
    if match is None:
        raise DamagedError(_describe_wrong_link(path, f"points to {target!r:.120}"))
    return match[1]


def _describe_wrong_link(path: Path, what: str) -> str:
    return (
        f"{path} {what}. Expected a relative link to {VERSIONS_FOLDER_NAME}/<digest>. Remove it "
        "and promote a version again; do not copy a registry in a way that follows links."
    )
