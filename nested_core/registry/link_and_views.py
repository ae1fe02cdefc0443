"""The folder of a name under its lock: its history, and the files that are derived from it (views).

The history decides. `champion` (a relative link, for mlx-lm's --adapter-path), policy.json and
champion.json are written after a new line, in this order; champion.json holds the hash of the last
line that all of them reflect. After a crash in between, the next writer finishes. A link that
differs without such a crash was moved by hand, which is recorded as a line `moved`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nested_core.errors import DamagedError, GateRejected, quote_path
from nested_core.registry.folders import (
    DATA_FOLDER_NAME,
    VERSIONS_FOLDER_NAME,
    exclusive_folder_lock,
    find_name_folder,
    shared_folder_lock,
)
from nested_core.registry.judgements import remove_judgements, remove_unnamed_judgements
from nested_core.registry.ledger import (
    LEDGER_NAME,
    NO_LINE_SHA256,
    REMOVAL_ACTIONS,
    Action,
    Ledger,
    append,
    cut_torn_line,
    new_entry,
    old_layout_error,
    read_ledger,
)
from nested_core.registry.mirroring import publish_if_mirrored
from nested_core.registry.versions import (
    AuditFinding,
    how_to_mend,
    read_provenance,
    registered_versions,
    verify_version,
)
from nested_core.storage.atomic import remove_leftovers, sync_path, temporary_beside, write_json
from nested_core.storage.lock_file import LockFile
from nested_core.storage.untrusted_files import file_type, read_json
from nested_core.text.digest_format import shorten_digest

LINK_NAME = "champion"
RECORD_NAME = "champion.json"
POLICY_NAME = "policy.json"
LINK_TARGET_PATTERN = re.compile(rf"{VERSIONS_FOLDER_NAME}/([0-9a-f]{{64}})")
END_FIELD = "last_line_sha256"
MAX_VIEW_BYTES = 4 * 1024 * 1024
FINISHING_AUTHOR = "nested-tune (finishing a registration that was cut short)"
MOVED_AUTHOR = "nested-tune (the link was found moved by hand)"


@dataclass
class NameFolder:
    """The folder of an adapter name while this process holds its exclusive lock.

    `record` appends a line to the history and updates the files that are derived from it.
    """

    path: Path
    lock: LockFile
    ledger: Ledger

    @property
    def champion(self) -> str | None:
        """The champion (the version in use) by the history; None before the first promotion."""
        return self.ledger.champion

    def version_path(self, version: str) -> Path:
        """Return the folder of a version, whether or not it exists."""
        return self.path / VERSIONS_FOLDER_NAME / version

    def verify(self, version: str) -> str:
        """Re-hash a version's files and check its verdict; return its manifest's hash.

        Raises DamagedError or GateRejected as `verify_version` does.
        """
        recorded = self.ledger.manifest_hashes(version)
        return verify_version(self.version_path(version), version, recorded)

    def confirm(self) -> None:
        """Raise DamagedError if the lock file was removed: another process may then be writing."""
        self.lock.require_still_at_path()

    def record(self, action: Action, version: str | None, by: str, **fields: object) -> None:
        """Append a line to the history, then update the files that are derived from it.

        The change is made once the line is on disk, whatever happens next.

        by: who makes the change. fields: further fields of the line.
        """
        entry = new_entry(action, version, self.champion, by, **fields)
        self.ledger = append(self.path, self.ledger, entry, confirm=self.confirm)
        self.write_views()

    def finish_interrupted(self) -> None:
        """Bring the folder into a state that the history describes, before anything else is done.

        Finishes what a crash interrupted: a half-written last line of the history is cut off, the
        files that are derived from the history are rewritten, and complete versions without a
        history line are registered. If a person moved the link `champion` to another version, this
        is recorded in the history; DamagedError if that version's files were changed.
        """
        if self.ledger.torn:
            self.confirm()  # that this process still holds the lock, before it writes
            self.ledger = cut_torn_line(self.path, self.ledger)
        link = read_link(self.path)
        if link in _expected_links(self.path, self.ledger):
            self.write_views()
        else:  # moved by hand
            manifest = None if link is None else self.verify(link)
            self.write_views(is_link_kept=True)
            self.record("moved", link, MOVED_AUTHOR, manifest=manifest)
        for version in sorted({*registered_versions(self.path)} - {*self.ledger.by_version}):
            with suppress(DamagedError, GateRejected):  # not registered; an audit reports it
                manifest = self.verify(version)
                self.record("registered", version, FINISHING_AUTHOR, manifest=manifest)
        remove_unnamed_judgements(self.path, self.ledger)

    def write_views(self, *, is_link_kept: bool = False) -> None:
        """Delete a version that the last line removed, then rewrite outdated derived files.

        is_link_kept: leave the `champion` link as it is.
        """
        last = self.ledger.entries[-1:]
        if last and last[0].action in REMOVAL_ACTIONS and are_views_behind(self.path, self.ledger):
            self.delete_version(str(last[0].version))
        if not is_link_kept and self.champion is not None:
            self._move_link(self.champion)
        for name, content in make_views(self.ledger).items():
            if content is not None and read_view(self.path / name) != content:
                write_json(self.path / name, content, confirm=self.confirm)

    def _move_link(self, champion: str) -> None:
        """Point the link `champion` at a version by one atomic rename."""
        if read_link(self.path) == champion:
            return
        link = self.path / LINK_NAME
        prepared = temporary_beside(link)
        os.symlink(f"{VERSIONS_FOLDER_NAME}/{champion}", prepared)
        self.confirm()
        os.replace(prepared, link)
        sync_path(self.path)

    def delete_version(self, version: str) -> None:
        """Delete files and judgements of a version that was removed according to the history."""
        place = self.version_path(version)
        self.confirm()
        if file_type(place) != "missing":
            os.rename(place, temporary_beside(place))
            sync_path(place.parent)
        remove_leftovers(place.parent)
        remove_judgements(self.path, version)


def writing(registry: Path, name: str) -> AbstractContextManager[NameFolder]:
    """Lock the folder of an adapter name for writing and finish interrupted changes.

    Raises ConfigError for an unknown name.
    """
    return writing_folder(find_name_folder(registry, name))


@contextmanager
def writing_folder(folder: Path) -> Iterator[NameFolder]:
    """Lock an adapter name's folder for writing and finish interrupted changes.

    A mirror of the name is brought up to date after the lock is released.
    Raises DamagedError for a damaged history, with nothing changed.
    """
    with exclusive_folder_lock(folder) as lock:
        lock.require_still_at_path()
        # What somebody without the lock has prepared can no longer take effect from here on.
        for place in (folder, folder / VERSIONS_FOLDER_NAME, folder / DATA_FOLDER_NAME):
            remove_leftovers(place)
        locked = NameFolder(folder, lock, read_ledger(folder))
        require_sound_end(folder, locked.ledger)
        locked.finish_interrupted()
        yield locked
    publish_if_mirrored(folder)


@contextmanager
def reading(registry: Path, name: str) -> Iterator[tuple[Path, Ledger]]:
    """Yield the folder and the history of an adapter name, with writers locked out.

    Raises DamagedError for a history that was edited, or a link that leads to no version.
    """
    folder = find_name_folder(registry, name)
    with shared_folder_lock(folder):
        ledger = read_ledger(folder)
        require_sound_end(folder, ledger)
        yield folder, ledger


def make_views(ledger: Ledger) -> dict[str, dict[str, object] | None]:
    """Return the contents of policy.json and champion.json.

    Returns None for a file that should not exist.

    ledger: the adapter's history.
    """
    record: dict[str, object] | None = None
    if ledger.entries:
        change = ledger.changes()[-1:]
        made = {key: getattr(change[0], key) if change else None for key in RECORD_FIELDS}
        record = made | {END_FIELD: ledger.end_sha256}
    return {POLICY_NAME: ledger.policy(), RECORD_NAME: record}


RECORD_FIELDS = ("version", "previous", "time", "by")


def read_view(path: Path) -> object:
    """Read policy.json or champion.json; None if it is missing or unreadable."""
    if file_type(path) != "file":
        return None
    try:
        return read_json(path, MAX_VIEW_BYTES)
    except DamagedError:
        return None


def read_recorded_end(folder: Path) -> str | None:
    """Return the hash of the last history line that champion.json reflects.

    Returns None if champion.json is damaged; the hash of no bytes without the file.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    path = folder / RECORD_NAME
    if file_type(path) == "missing":
        return NO_LINE_SHA256
    record = read_view(path)
    end = record.get(END_FIELD) if isinstance(record, dict) else None
    return end if isinstance(end, str) else None


def are_views_behind(folder: Path, ledger: Ledger) -> bool:
    """Return whether the derived files do not reflect the last history line, as after a crash.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    return bool(ledger.entries) and read_recorded_end(folder) != ledger.end_sha256


def _expected_links(folder: Path, ledger: Ledger) -> set[str | None]:
    """Return the versions that the champion link may point to without having been moved by hand.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    ledger: the adapter's history.
    """
    before = {ledger.entries[-1].previous} if are_views_behind(folder, ledger) else set()
    return {ledger.champion, *before}


def read_link(folder: Path) -> str | None:
    """Return the version that the link `champion` points to; None without a link.

    The version may not exist. Raises DamagedError if `champion` is no link or leads elsewhere.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    path = folder / LINK_NAME
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
    """Describe what is wrong with the champion link and how to repair it."""
    return (
        f"{path} {what}. Expected a relative link to {VERSIONS_FOLDER_NAME}/<digest>. Remove it "
        "and promote a version again; do not copy a registry in a way that follows links."
    )


def version_exists(folder: Path, version: str | None) -> bool:
    """Return whether a version's folder exists; True for None."""
    return version is None or file_type(folder / VERSIONS_FOLDER_NAME / version) == "directory"


def require_sound_end(folder: Path, ledger: Ledger) -> None:
    """Raise DamagedError if champion.json or the link contradicts the end of the history.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    link = read_link(folder)
    if link is not None and not ledger.entries:
        raise DamagedError(
            f"{folder / LINK_NAME} points to {shorten_digest(link)}, and {folder / LEDGER_NAME} "
            "does not say how it became the champion. Restore the history from a backup, or "
            "remove the link and champion.json and promote the version again."
        )
    require_own_layout(folder, ledger)
    if (finding := find_wrong_recorded_end(folder, ledger)) is not None:
        separator = ", " if finding.message.startswith("line ") else " "
        raise DamagedError(f"{finding.file}{separator}{finding.message}")
    if link not in _expected_links(folder, ledger) and not version_exists(folder, link):
        raise lost_champion_error(folder, str(link), ledger)


def require_own_layout(folder: Path, ledger: Ledger) -> None:
    """Raise DamagedError for a name of an earlier release, which recorded no registrations.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    ledger: the adapter's history.
    """
    for version in () if ledger.entries else registered_versions(folder):
        provenance = {}
        with suppress(DamagedError):
            provenance = read_provenance(folder / VERSIONS_FOLDER_NAME / version)
        if "registered_after" in provenance:
            raise old_layout_error(folder)


def find_wrong_recorded_end(folder: Path, ledger: Ledger) -> AuditFinding | None:
    """Return a finding if champion.json records another end of the history than it has.

    champion.json holds the hash of the last history line, which shows whether lines were removed or
    edited. A writer adds the line first. So the hash of the line before the last is accepted too: a
    crash came between the two writes.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    path, history, last = folder / RECORD_NAME, folder / LEDGER_NAME, len(ledger.entries)
    recorded = read_recorded_end(folder)
    before_last = ledger.entries[-1].previous_line_sha256 if ledger.entries else None
    if recorded in (ledger.end_sha256, before_last):
        return None
    if not ledger.entries:
        message = (
            f"line {last + 1} is missing: {RECORD_NAME} holds the hash of a line that is not there."
            " Restore the file from a backup; to begin anew, remove the link and champion.json."
        )
        return AuditFinding(history, message)
    how_to_repair = (
        "Restore the folder from a backup; or, if the history is right, remove "
        f'{RECORD_NAME} and write {{"{END_FIELD}": "{ledger.end_sha256}"}} into {RECORD_NAME}.'
    )
    if recorded in (None, NO_LINE_SHA256):
        missing = f"does not hold the hash of the last line of {LEDGER_NAME}, line {last}"
        return AuditFinding(path, f"{missing}. {how_to_repair}")
    what = f"line {last} was edited, or lines were removed or added: {RECORD_NAME} holds the hash"
    return AuditFinding(history, f"{what} of another line. {how_to_repair}")


def lost_champion_error(folder: Path, champion: str, ledger: Ledger) -> DamagedError:
    """Build the error for a champion link to a version that is gone, with ways to repair it.

    The ways differ: a version that was champion by the history has lost its folder; any other means
    that the link was moved by hand.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    ledger: the adapter's history.
    """
    link, version_path = folder / LINK_NAME, folder / VERSIONS_FOLDER_NAME / champion
    if champion in ledger.champion_versions():
        return DamagedError(
            f"{link} points to {shorten_digest(champion)}, whose folder is gone. "
            f"{how_to_mend(version_path)} Before a version that is champion can be forgotten, make "
            f"another one champion: `nested-tune rollback {folder.name} --registry "
            f"{quote_path(folder.parent)} --to VERSION`, or promote another run."
        )
    back = f"remove {link}"
    if ledger.champion is not None:
        back = f"`ln -sfn {VERSIONS_FOLDER_NAME}/{ledger.champion} {quote_path(link)}`"
    return DamagedError(
        f"{link} points to {shorten_digest(champion)}, which is no version of {folder.name}: it "
        f"was moved by hand. Put back what the history says: {back}."
    )
