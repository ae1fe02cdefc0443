"""The ledger, history.jsonl: a line for each change of the champion and each version collected.

It is only appended to. Each line holds the SHA-256 of the line before it, the first such line that
of all before it, and champion.json that of the last line: an edit anywhere is found by who reads.
A last line without its line end was torn by a crash before its change took effect: readers ignore
it, and the next writer removes it. Any other line that cannot be read or does not follow is damage.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from nested_core.errors import DamagedError, MissingFileError, describe_first_problem
from nested_core.storage.atomic import Confirm, sync_descriptor, sync_path
from nested_core.storage.lock_file import lock_open_file
from nested_core.storage.strict_files import file_type, read_regular
from nested_core.text.digest_format import shorten_digest

LEDGER_NAME = "history.jsonl"
Action = Literal[
    "promote",
    "rollback",
    "moved",
    "aborted",
    "collected",
    "forgotten",
    "restored",
    "declined",
    "policy",
]
CHAMPION_CHANGE_ACTIONS = ("promote", "rollback", "moved")
REMOVAL_ACTIONS = ("collected", "forgotten")
# Fields that few lines have: left out of a line where they are null.
OPTIONAL_FIELDS = (
    "judgement",
    "reason",
    "against_policy",
    "before",
    "after",
    "flow_run",
    "deployment",
    "dataset_digest",
    "settings_digest",
)


@dataclass(frozen=True)
class Origin:
    """The flow run that asks for a change, and its deployment; None where a person asks."""

    flow_run: str | None = None
    deployment: str | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the history.

    `previous` is the champion before it, and after it too unless the action moved the champion:
    `promote`, `rollback`, and `moved` (the link was found moved by hand). `aborted` says that
    `version` did not become the champion, `collected` and `forgotten` that it was removed,
    `restored` that a version which was lost was registered again, `declined` that a person did not
    approve it, and `policy` that the registry's policy changed.

    explicit: a rollback that named its version (`--to`).
    previous_line_sha256: of the line before, its bytes with the line end; of no bytes for the
        first line. The writer sets it.
    judgement: the hash of the judgement that a promotion rests on, where the version was judged
        again since it was registered.
    reason: what the server, or the person who asked or declined, gives as the reason.
    dataset_digest, settings_digest: of the run whose version was declined: of another version of
        the same two nobody is asked.
    against_policy: what the registry's policy asks for, and a person's promotion did not have.
    before, after: the policy.
    """

    action: Action
    version: str | None
    previous: str | None
    time: str
    by: str
    manifest: str | None = None
    automatic: bool = False
    explicit: bool = False
    previous_line_sha256: str = ""
    judgement: str | None = None
    reason: str | None = None
    against_policy: str | None = None
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    flow_run: str | None = None
    deployment: str | None = None
    dataset_digest: str | None = None
    settings_digest: str | None = None

    @property
    def champion_after(self) -> str | None:
        """The champion that this line leaves behind."""
        return self.version if self.action in CHAMPION_CHANGE_ACTIONS else self.previous

    def fields(self) -> dict[str, Any]:
        """The line's JSON object."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None or name not in OPTIONAL_FIELDS
        }


class RollbackStack:
    """Versions from the first champion to the present one, which is on top.

    No two neighbours are equal. A version that was removed is dropped when it would come up, so
    that n entries take some n steps.
    """

    def __init__(self) -> None:
        self._pushed: list[tuple[str, int]] = []  # each with the number of pushes until then
        self._removed: dict[str, int] = {}  # and what was removed, with that number then
        self._pushes = 0

    def push(self, version: str) -> None:
        """Put a version on top, unless it is there."""
        if self.top() != version:
            self._pushes += 1
            self._pushed.append((version, self._pushes))

    def pop(self) -> None:
        """Take the top off."""
        top = self.top()
        self._pushed.pop()
        self._drop_removed(top)

    def top(self) -> str | None:
        """The version on top, or None."""
        self._drop_removed()
        return self._pushed[-1][0] if self._pushed else None

    def second(self) -> str | None:
        """The version below the top, or None."""
        top = self.top()
        if top is None:
            return None
        place = self._pushed.pop()
        self._drop_removed(top)
        second = self._pushed[-1][0] if self._pushed else None
        self._pushed.append(place)
        return second

    def remove(self, version: str | None) -> None:
        """Take a version out wherever it stands; of equal neighbours one stays."""
        self._removed[version or ""] = self._pushes

    def _drop_removed(self, above: str | None = None) -> None:
        """Take what was removed off the end, and what equals the version that stands above."""
        while self._pushed:
            version, number = self._pushed[-1]
            if version != above and number > self._removed.get(version, 0):
                return
            self._pushed.pop()


NO_ORIGIN = Origin()
ENTRY_VALIDATOR = TypeAdapter(Entry)


@dataclass(frozen=True)
class Ledger:
    """The history as read: its entries, the bytes that they take, and a torn line after them.

    end_sha256: the hash that the next line has to hold: the last line's, or that of no bytes.
    """

    entries: tuple[Entry, ...] = ()
    whole_bytes: int = 0
    torn: bytes = b""
    end_sha256: str = hashlib.sha256().hexdigest()

    @property
    def last_line_sha256(self) -> str | None:
        """The hash that champion.json has to hold; None before the first line."""
        return self.end_sha256 if self.entries else None

    def without_last_line(self) -> Ledger:
        """The history as it was before its last line."""
        *entries, last = self.entries
        return Ledger(tuple(entries), end_sha256=last.previous_line_sha256)

    def since(self, end_sha256: str) -> Ledger:
        """The lines after the one with that hash; all of them if no line has it."""
        if end_sha256 == self.end_sha256:
            return Ledger()
        for number, entry in enumerate(self.entries):
            if entry.previous_line_sha256 == end_sha256:
                return Ledger(self.entries[number:])
        return self

    @property
    def champion(self) -> str | None:
        """The champion according to the last line."""
        return self.entries[-1].champion_after if self.entries else None

    def changes(self) -> list[Entry]:
        """The changes that took effect: promotions and rollbacks but the aborted ones."""
        return [
            entry for entry in self._effective_entries() if entry.action in CHAMPION_CHANGE_ACTIONS
        ]

    def rollback_target(self) -> str | None:
        """The version that a rollback without `--to` goes to, or None if there is none left.

        Where the link was moved by hand, that is the champion before somebody moved it.
        """
        stack = self._champion_stack()
        top = stack.top()
        return stack.second() if top is None or top == self.champion else top

    def _champion_stack(self) -> RollbackStack:
        """The champions that rollbacks go back through; the present one is on top.

        Promotions and `rollback --to` push a version, a plain rollback pops one, and a version that
        was collected or forgotten cannot be gone back to. All other lines are passed over.
        """
        stack = RollbackStack()
        for entry in self._effective_entries():
            is_plain = entry.action == "rollback" and not entry.explicit
            if entry.action in REMOVAL_ACTIONS:
                stack.remove(entry.version)
            elif entry.action not in ("promote", "rollback") or entry.version is None:
                continue
            elif is_plain and stack.second() == entry.version != stack.top():
                stack.pop()
            else:
                stack.push(entry.version)
        return stack

    def _effective_entries(self) -> list[Entry]:
        """The entries without aborted changes and the lines that abort them."""
        effective: list[Entry] = []
        for entry in self.entries:
            if entry.action != "aborted":
                effective.append(entry)
                continue
            last = effective[-1] if effective else entry
            if last.action in ("promote", "rollback") and last.version == entry.version:
                effective.pop()
        return effective

    def barred_versions(self) -> set[str]:
        """Versions that a rollback left and that nobody has promoted by name since."""
        barred: set[str] = set()
        for change in self.changes():
            if change.action == "rollback" and change.previous is not None:
                barred.add(change.previous)
            elif change.action == "promote" and not change.automatic and change.version:
                barred.discard(change.version)
        return barred

    def champion_versions(self) -> set[str]:
        """Every version that was champion and was not collected or forgotten since."""
        standing = self._manifest_hashes_by_version().keys()
        return {v for change in self.changes() if (v := change.version) in standing}

    def manifest_hashes(self, version: str) -> set[str]:
        """The manifest hashes that were recorded for `version` as it is there now."""
        return self._manifest_hashes_by_version().get(version, set())

    def _manifest_hashes_by_version(self) -> dict[str, set[str]]:
        """Manifest hashes by version, since it was last removed or restored."""
        manifests: dict[str, set[str]] = {}
        for entry in self.entries:
            if entry.version is None:
                continue
            if entry.action in REMOVAL_ACTIONS:
                manifests.pop(entry.version, None)
            elif entry.action == "restored":
                manifests[entry.version] = {str(entry.manifest)}
            elif entry.action in CHAMPION_CHANGE_ACTIONS:
                known = manifests.setdefault(entry.version, set())
                known |= {entry.manifest} if entry.manifest is not None else set()
        return manifests

    def last_judgements(self) -> dict[str, str]:
        """By version, the judgement that the last promotion or restoration of it rests on."""
        hashes: dict[str, str] = {}
        for entry in self._effective_entries():
            if entry.version is None:
                continue
            if entry.action in REMOVAL_ACTIONS or entry.action == "restored":
                hashes.pop(entry.version, None)
            if entry.judgement is not None:
                hashes[entry.version] = entry.judgement
        return hashes

    def is_removed(self, version: str) -> bool:
        """Whether the last line about a version says that it was collected or forgotten."""
        lines = [entry for entry in self.entries if entry.version == version]
        return bool(lines) and lines[-1].action in REMOVAL_ACTIONS

    def find_decline(
        self, version: str, dataset_digest: str | None = None, settings_digest: str | None = None
    ) -> Entry | None:
        """The newest line in which a person declined a version, or one of the same two digests.

        None where somebody has made that version champion since.
        """
        made_of = (dataset_digest, settings_digest)
        for entry in reversed(self._effective_entries()):
            if entry.version == version and entry.action in CHAMPION_CHANGE_ACTIONS:
                return None
            if entry.action != "declined":
                continue
            is_alike = None not in made_of and made_of == (
                entry.dataset_digest,
                entry.settings_digest,
            )
            if entry.version == version or is_alike:
                return entry
        return None

    def versions_since(self, promotions: int) -> list[str]:
        """The champions of the last promotions, after the one before them; the oldest first.

        Without those that were collected, forgotten, or left by a rollback.
        """
        last = [change for change in self.changes() if change.action == "promote"][-promotions:]
        versions = [*(change.previous for change in last[:1]), *(change.version for change in last)]
        usable = self.champion_versions() - self.barred_versions()
        return [version for version in versions if version in usable]

    def policy(self) -> dict[str, Any] | None:
        """The registry's policy, as its last change left it; None if none was ever set."""
        return next((e.after for e in reversed(self.entries) if e.action == "policy"), None)


def describe_author(line: Mapping[str, Any]) -> str:
    """Who made a change, and the reason where one was given, of a line's JSON object."""
    return f"{line['by']}: {line['reason']}" if line.get("reason") else str(line["by"])


def new_entry(action: Action, version: str | None, previous: str | None, by: str) -> Entry:
    """An entry with the present time (UTC); what is not text in `by` is replaced by '?'."""
    return Entry(
        action=action,
        version=version,
        previous=previous,
        time=datetime.now(UTC).isoformat(timespec="microseconds"),
        by=_replace_what_is_no_text(by),
    )


def _replace_what_is_no_text(typed: str) -> str:
    return typed.encode(errors="replace").decode()


def read_ledger(folder: Path) -> Ledger:
    """Read the history of `folder`; DamagedError names the first line that is not one."""
    path = folder / LEDGER_NAME
    kind = file_type(path)
    if kind == "link":
        raise DamagedError(
            f"{path} is a symbolic link; a registry has none but `champion`. "
            "Replace it by the file that it leads to."
        )
    if kind not in ("file", "missing"):
        raise DamagedError(f"{path} is no regular file. Restore the history from a backup.")
    try:
        content = read_regular(path)
    except MissingFileError:
        return Ledger()
    *lines, torn = content.split(b"\n")
    entries = tuple(_parse_entry(line, path, number) for number, line in enumerate(lines, 1))
    whole_bytes = len(content) - len(torn)
    end_sha256 = _check_chain(path, lines, entries)
    return Ledger(entries, whole_bytes, torn, end_sha256)


def append(folder: Path, ledger: Ledger, entry: Entry, *, confirm: Confirm) -> Ledger:
    """Add a line to the history as it was read, force it onto the disk, and return the new history.

    `confirm` is called just before, and raises where another process could be writing.
    """
    path = folder / LEDGER_NAME
    reason = None if entry.reason is None else _replace_what_is_no_text(entry.reason)
    entry = replace(entry, previous_line_sha256=ledger.end_sha256, reason=reason)
    line = json.dumps(entry.fields()).encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        lock_open_file(descriptor, path)  # held while the size is what was read
        size = os.fstat(descriptor).st_size
        if size != ledger.whole_bytes:
            raise DamagedError(
                f"{path} had {ledger.whole_bytes} bytes when it was read under the lock, and has "
                f"{size} now: something writes to it without the lock. Nothing was changed."
            )
        confirm()
        _write_all(descriptor, line)
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)
    if size == 0:
        sync_path(folder)
    end_sha256 = hashlib.sha256(line).hexdigest()
    return Ledger((*ledger.entries, entry), ledger.whole_bytes + len(line), b"", end_sha256)


def cut_torn_line(folder: Path, ledger: Ledger) -> Ledger:
    """Remove what a crash left after the last whole line; return the history without it."""
    descriptor = os.open(folder / LEDGER_NAME, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.ftruncate(descriptor, ledger.whole_bytes)
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)
    return replace(ledger, torn=b"")


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _parse_entry(line: bytes, path: Path, number: int) -> Entry:
    try:
        return ENTRY_VALIDATOR.validate_json(line, strict=True)
    except ValidationError as error:
        problem = describe_first_problem(error, "the line")
        raise DamagedError(
            f"{path}, line {number}, is not an entry of the history ({problem}). "
            "Expected one JSON object a line, as promote and rollback write it; restore the file "
            "from a backup."
        ) from error


def _check_chain(path: Path, lines: list[bytes], entries: tuple[Entry, ...]) -> str:
    """Check that each line follows the one before; return the hash that the next has to hold."""
    champion: str | None = None
    end_sha256 = hashlib.sha256().hexdigest()
    for number, (line, entry) in enumerate(zip(lines, entries, strict=True), 1):
        if entry.previous_line_sha256 != end_sha256:
            before = f"line {number - 1}" if number > 1 else "an empty file"
            raise _broken_chain_error(path, number, f"does not hold the hash of {before}")
        if entry.action != "aborted" and entry.previous != champion:
            problem = (
                f"replaced {shorten_digest(entry.previous or 'none')}, but the line before it left "
                f"{shorten_digest(champion or 'none')}"
            )
            raise _broken_chain_error(path, number, problem)
        end_sha256 = hashlib.sha256(line + b"\n").hexdigest()
        champion = entry.champion_after
    return end_sha256


def _broken_chain_error(path: Path, number: int, problem: str) -> DamagedError:
    return DamagedError(
        f"{path}, line {number} {problem}: a line was removed, added or edited. Nothing is decided "
        "by this history and nothing written to it; restore the file from a backup."
    )
