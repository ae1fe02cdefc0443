"""The champion: a relative symbolic link to a version, replaced by one rename, and champion.json.

The next link is prepared beside it first, so that an interrupted change can be told from a link
that was moved by hand. A link to anywhere but versions/<digest> is refused. champion.json says who
made the champion and when, and has the hash of the history's last line, which the history's end is
held to. After a crash it may be that of the line before: a change writes the history, then
champion.json, then the link. Any other difference is damage.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from nested_core.errors import DamagedError
from nested_core.registry.folders import VERSIONS_FOLDER_NAME
from nested_core.registry.ledger import LEDGER_NAME, Ledger
from nested_core.registry.versions import AuditFinding
from nested_core.storage.atomic import Confirm, sync_path, write_json
from nested_core.storage.strict_files import file_type, read_json

LINK_NAME = "champion"
PREPARED_PREFIX = ".champion-next"
LINK_TARGET_PATTERN = re.compile(rf"{VERSIONS_FOLDER_NAME}/([0-9a-f]{{64}})")

RECORD_NAME = "champion.json"
MAX_RECORD_BYTES = 64 * 1024
LEDGER_HASH_FIELD = "last_line_sha256"
FIELDS_FROM_LEDGER_ENTRY = ("version", "previous", "time", "by")
IS_DIRECTORY_MESSAGE = (
    "is a directory. Expected the file that says who made the champion, and when. Remove it, and "
    "restore the file from a backup."
)


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


def make_record(champion: str | None, ledger: Ledger) -> dict[str, Any] | None:
    """The content of champion.json: the last change that made this version the champion.

    None, for no file, before the first line of the history.
    """
    if champion is None and ledger.last_line_sha256 is None:
        return None
    changes = reversed(ledger.changes())
    made_by = next((change for change in changes if change.version == champion), None)
    record = {field: getattr(made_by, field, None) for field in FIELDS_FROM_LEDGER_ENTRY} | {
        "version": champion
    }
    return record | {LEDGER_HASH_FIELD: ledger.last_line_sha256}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read champion.json; None if it is missing, {} if it cannot be read."""
    path = folder / RECORD_NAME
    kind = file_type(path)
    if kind != "file":
        return None if kind == "missing" else {}
    try:
        record = read_json(path, MAX_RECORD_BYTES)
    except DamagedError:
        return {}
    return record if isinstance(record, dict) else {}


def write_record(folder: Path, record: dict[str, Any] | None, *, confirm: Confirm) -> None:
    """Replace champion.json, or remove it if there is nothing to record.

    `confirm` is called just before, and raises where another process could be writing. Raises
    DamagedError for a directory in the file's place, which cannot be replaced in one step.
    """
    path = folder / RECORD_NAME
    if file_type(path) == "directory":
        raise DamagedError(f"{path} {IS_DIRECTORY_MESSAGE}")
    if record is not None:
        write_json(path, record, confirm=confirm)
    else:
        path.unlink(missing_ok=True)


def is_last_change_unfinished(
    champion: str | None, record: dict[str, Any] | None, ledger: Ledger
) -> bool:
    """Whether a crash came after the history's last line and before champion.json and the link."""
    if ledger.last_line_sha256 is None or ledger.torn:
        return False
    before = ledger.without_last_line()
    # The second: a change that got as far as champion.json, and was then marked aborted.
    earlier = (make_record(champion, before), make_record(before.champion, before))
    return ledger.entries[-1].previous == champion and record in earlier


def find_disagreement(
    folder: Path, champion: str | None, record: dict[str, Any] | None, ledger: Ledger
) -> AuditFinding | None:
    """Why the history does not end as champion.json says, unless a crash can have left it so."""
    recorded = (record or {}).get(LEDGER_HASH_FIELD)
    if recorded != ledger.last_line_sha256:
        if is_last_change_unfinished(champion, record, ledger):
            return None
        return _ledger_hash_finding(folder, recorded, ledger)
    # A change that never reached the link may have been marked aborted when the crash came.
    is_open = bool(ledger.entries) and ledger.entries[-1].previous == champion
    if ledger.torn and ledger.champion != champion and not is_open:
        number = len(ledger.entries) + 1
        message = f"line {number} is cut, though the link leads to its version already"
        return AuditFinding(folder / LEDGER_NAME, f"{message}. Restore the file from a backup.")
    return None


def _ledger_hash_finding(folder: Path, recorded: Any, ledger: Ledger) -> AuditFinding:
    path, history, last = folder / RECORD_NAME, folder / LEDGER_NAME, len(ledger.entries)
    if file_type(path) == "directory":
        return AuditFinding(path, IS_DIRECTORY_MESSAGE)
    if ledger.last_line_sha256 is None:
        message = (
            f"line {last + 1} is missing: {RECORD_NAME} holds the hash of a line that is not there."
            " Restore the file from a backup; to begin anew, remove the link and champion.json."
        )
        return AuditFinding(history, message)
    accept = (
        "Restore the folder from a backup; or, if the history is right as it stands, write "
        f'{{"{LEDGER_HASH_FIELD}": "{ledger.last_line_sha256}"}} into {RECORD_NAME}.'
    )
    if recorded is None:
        missing = f"does not hold the hash of the last line of {LEDGER_NAME}, line {last}"
        return AuditFinding(path, f"{missing}. {accept}")
    earlier = [n for n, e in enumerate(ledger.entries, 1) if e.previous_line_sha256 == recorded]
    what = f"line {last} was edited, or lines after it were removed"
    if earlier:
        what = f"line {earlier[0]} and what follows was added by something else"
    return AuditFinding(history, f"{what}: {RECORD_NAME} holds the hash of another line. {accept}")
