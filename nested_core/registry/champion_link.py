"""The champion: a relative symbolic link, replaced by one rename, and the file champion.json.

The next link is prepared beside it first, so that an interrupted change can be told from a link
that was moved by hand. A link to anywhere but versions/<digest> is refused.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

from nested_core.errors import DamagedError
from nested_core.registry.ledger import Entry
from nested_core.registry.name_folders import VERSIONS
from nested_core.storage.atomic import sync_path, write_json
from nested_core.storage.strict_files import file_type, read_json

LINK_NAME = "champion"
PREPARED_NAME = ".champion-next"
RECORD_NAME = "champion.json"
MAX_RECORD_BYTES = 64 * 1024
RECORD_FIELDS = ("version", "previous", "time", "by")
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


def swap(folder: Path) -> None:
    """Rename the prepared link to `champion`: a reader sees the old one or the new one."""
    os.replace(folder / PREPARED_NAME, folder / LINK_NAME)
    sync_path(folder)


def discard_prepared(folder: Path) -> None:
    """Remove a prepared link that never became the champion."""
    path = folder / PREPARED_NAME
    if file_type(path) != "missing":
        path.unlink()
        sync_path(folder)


def make_record(champion: str | None, changes: list[Entry]) -> dict[str, Any] | None:
    """The content of champion.json: the last change that made this version the champion."""
    if champion is None:
        return None
    made_by = next((change for change in reversed(changes) if change.version == champion), None)
    return {field: getattr(made_by, field, None) for field in RECORD_FIELDS} | {"version": champion}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read champion.json; an unreadable one counts as empty, because the link decides."""
    path = folder / RECORD_NAME
    kind = file_type(path)
    if kind != "file":
        return None if kind == "missing" else {}
    try:
        record = read_json(path, MAX_RECORD_BYTES)
    except DamagedError:
        return {}
    return record if isinstance(record, dict) else {}


def write_record(folder: Path, record: dict[str, Any] | None) -> None:
    """Replace champion.json, or remove it if there is no champion.

    Raises DamagedError for a directory in its place, which cannot be replaced in one step.
    """
    path = folder / RECORD_NAME
    if file_type(path) == "directory":
        raise DamagedError(
            f"{path} is a directory. Expected the file that says who made the champion, and when. "
            "Remove it: the history says the same, and the file is written anew from there."
        )
    if record is not None:
        write_json(path, record)
    else:
        path.unlink(missing_ok=True)


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
