"""The ledger, history.jsonl: whatever was done to a name is a line of it, and the lines decide.

It is only appended to. Each line holds the SHA-256 of the line before it, and champion.json that of
the last line: an edit anywhere is found by who reads. A last line without its line end was torn by
a crash: readers ignore it, and the next writer removes it. Any other line that cannot be read or
does not follow is damage.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from nested_core.errors import DamagedError, MissingFileError, describe_first_problem
from nested_core.storage.atomic import Confirm, sync_descriptor, sync_path
from nested_core.storage.lock_file import lock_open_file
from nested_core.storage.untrusted_files import file_type, read_regular
from nested_core.text.digest_format import shorten_digest

LEDGER_NAME = "history.jsonl"
LAYOUT = 2  # of the lines, and of what they are about: stands in the first one
Action = Literal[
    "registered",
    "judged",
    "promote",
    "rollback",
    "moved",
    "collected",
    "forgotten",
    "restored",
    "declined",
    "tried",
    "policy",
    "rows_forgotten",
]
CHAMPION_CHANGE_ACTIONS = ("promote", "rollback", "moved")
REMOVAL_ACTIONS = ("collected", "forgotten")
REGISTRATION_ACTIONS = ("registered", "judged")
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
    "conditions_digest",
    "outcome",
    "run",
    "layout",
)


@dataclass(frozen=True)
class Origin:
    """The flow run that asks for a change, and its deployment; None if a person asks."""

    flow_run: str | None = None
    deployment: str | None = None

    def fields(self) -> dict[str, str | None]:
        """The two fields of a line."""
        return {"flow_run": self.flow_run, "deployment": self.deployment}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the history.

    `previous` is the champion before it, and after it too unless the action moved the champion:
    `promote`, `rollback`, and `moved` (the link was found moved by hand). `registered` says that
    `version` was added, `judged` that its run was judged again, `collected` and `forgotten` that it
    was removed, `restored` that a version which was lost was registered again, `declined` that a
    person did not approve it, `tried` that a run from the champion made no version, `policy` that
    the registry's policy changed, and `rows_forgotten` that rows of a version were taken out of the
    data store.

    explicit: a rollback that named its version (`--to`).
    previous_line_sha256: of the line before, its bytes with the line end; of no bytes for the
        first line. The writer sets it.
    judgement: the hash of a judgement's file: what a run was judged, or a promotion rests on.
    reason: what the server, or the person who asked or declined, gives as the reason; of a run
        that made no version what the gate found.
    dataset_digest, settings_digest: of the run whose version was declined: of another version of
        the same two nobody is asked. Of a run that made no version, to be read by a person.
    conditions_digest: of all that decided what became of a run from the champion (pipeline/
        continual.py): where it is the same again, nothing is trained.
    outcome, run: of a run that made no version: what became of it, and its folder.
    against_policy: what the registry's policy asks for, and a person's promotion did not have.
    before, after: the policy.
    layout: LAYOUT, in the first line.
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
    conditions_digest: str | None = None
    outcome: str | None = None
    run: str | None = None
    layout: int | None = None

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


NO_ORIGIN = Origin()
ENTRY_VALIDATOR = TypeAdapter(Entry)


NO_LINE_SHA256 = hashlib.sha256().hexdigest()


@dataclass(frozen=True)
class Ledger:
    """The history as read: its entries, the bytes that they take, and a torn line after them.

    end_sha256: the hash that the next line has to hold: the last line's, or that of no bytes.
    """

    entries: tuple[Entry, ...] = ()
    whole_bytes: int = 0
    torn: bytes = b""
    end_sha256: str = NO_LINE_SHA256

    @property
    def champion(self) -> str | None:
        """The champion according to the last line."""
        return self.entries[-1].champion_after if self.entries else None

    def changes(self, since: int = 0) -> list[Entry]:
        """The changes of the champion, of all lines or of those from number `since` (0 first)."""
        return [e for e in self.entries[since:] if e.action in CHAMPION_CHANGE_ACTIONS]

    @cached_property
    def standing(self) -> dict[str, list[tuple[int, Entry]]]:
        """The lines about each version that is there, with their numbers from 0.

        Those since it was last restored; nothing of a version that was collected or forgotten.
        """
        lines: dict[str, list[tuple[int, Entry]]] = {}
        for number, entry in enumerate(self.entries):
            if entry.version is None or entry.action == "policy":
                continue
            if entry.action in REMOVAL_ACTIONS:
                lines.pop(entry.version, None)
            elif entry.action == "restored":
                lines[entry.version] = [(number, entry)]
            else:
                lines.setdefault(entry.version, []).append((number, entry))
        return lines

    def is_removed(self, version: str) -> bool:
        """Whether a version was collected or forgotten, and not registered since."""
        return version not in self.standing and any(e.version == version for e in self.entries)

    def manifest_hashes(self, version: str) -> set[str]:
        """The manifest hashes that were recorded for `version` as it is there now."""
        return {e.manifest for _, e in self.standing.get(version, ()) if e.manifest is not None}

    def judgements(self, version: str) -> list[tuple[int, str]]:
        """Of each verdict on a version after its first, its line's number and its hash."""
        lines = self.standing.get(version, ())
        actions = ("judged", "restored")
        return [(n, e.judgement) for n, e in lines if e.judgement and e.action in actions]

    def champion_versions(self) -> set[str]:
        """Every version that was champion and was not collected or forgotten since."""
        champions: set[str] = set()
        for entry in self.entries:
            if entry.version is not None and entry.action in CHAMPION_CHANGE_ACTIONS:
                champions.add(entry.version)
            elif entry.version is not None and entry.action in REMOVAL_ACTIONS:
                champions.discard(entry.version)
        return champions

    def rollback_target(self) -> str | None:
        """The version that a rollback without `--to` goes to, or None if no version is left.

        Promotions and `rollback --to` push a version on a stack, a plain rollback pops one, and a
        version that was collected or forgotten is taken out. All other lines are passed over: where
        the link was moved by hand, the target is the champion before somebody moved it.
        """
        stack: list[str] = []
        for entry in self.entries:
            if entry.action in REMOVAL_ACTIONS and entry.version in stack:
                stack = [v for v, _ in groupby(v for v in stack if v != entry.version)]
            elif entry.action not in ("promote", "rollback") or entry.version is None:
                continue
            elif (
                entry.action == "rollback"
                and not entry.explicit
                and stack[-2:-1] == [entry.version]
            ):
                stack.pop()
            elif stack[-1:] != [entry.version]:
                stack.append(entry.version)
        if stack[-1:] == [self.champion]:
            stack.pop()
        return stack[-1] if stack else None

    def barred_versions(self) -> set[str]:
        """Versions that a rollback left and that nobody has promoted by name since."""
        barred: set[str] = set()
        for change in self.changes():
            if change.action == "rollback" and change.previous is not None:
                barred.add(change.previous)
            elif change.action == "promote" and not change.automatic and change.version:
                barred.discard(change.version)
        return barred

    def versions_since(self, promotions: int) -> list[str]:
        """The champions of the last promotions, after the one before them; the oldest first.

        Without those that were collected, forgotten, or left by a rollback.
        """
        last = [change for change in self.changes() if change.action == "promote"][-promotions:]
        versions = [*(change.previous for change in last[:1]), *(change.version for change in last)]
        usable = self.champion_versions() - self.barred_versions()
        return [version for version in versions if version in usable]

    def policy(self) -> dict[str, Any] | None:
        """The registry's policy, as its last change left it; None if it was never set."""
        return next((e.after for e in reversed(self.entries) if e.action == "policy"), None)


def describe_author(line: Mapping[str, Any]) -> str:
    """Who made a change, and the reason where one was given, of a line's JSON object."""
    return f"{line['by']}: {line['reason']}" if line.get("reason") else str(line["by"])


def new_entry(
    action: Action, version: str | None, previous: str | None, by: str, **more: Any
) -> Entry:
    """An entry with the present time (UTC); what is not text in `by` is replaced by '?'."""
    return Entry(
        action=action,
        version=version,
        previous=previous,
        time=datetime.now(UTC).isoformat(timespec="microseconds"),
        by=_replace_what_is_no_text(by),
        **more,
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
    if entries and entries[0].layout is None and entries[0].previous_line_sha256 == NO_LINE_SHA256:
        raise old_layout_error(folder)
    end_sha256 = _check_chain(path, lines, entries)
    return Ledger(entries, whole_bytes, torn, end_sha256)


def old_layout_error(folder: Path) -> DamagedError:
    """The error for a name whose history does not say what was registered."""
    return DamagedError(
        f"{folder / LEDGER_NAME} is of an earlier nested-tune, and does not say what was "
        f"registered: move the folder {folder.name} away, and give `nested-tune promote RUN_DIR "
        f"--registry {folder.parent} --name {folder.name}` for each run that is to be in it."
    )


@contextmanager
def holding_end(folder: Path, ledger: Ledger) -> Iterator[int]:
    """The history open for appending, as long as it was read, and locked until the block ends.

    So a line whose writer has lost the lock of the folder is either there before the block, and
    raises DamagedError, or is not written after it.
    """
    path = folder / LEDGER_NAME
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        lock_open_file(descriptor, path)
        size = os.fstat(descriptor).st_size
        if size != ledger.whole_bytes:
            raise DamagedError(
                f"{path} had {ledger.whole_bytes} bytes when it was read under the lock, and has "
                f"{size} now: something writes to it without the lock. Nothing was changed."
            )
        yield descriptor
    finally:
        os.close(descriptor)


def append(folder: Path, ledger: Ledger, entry: Entry, *, confirm: Confirm) -> Ledger:
    """Add a line to the history as it was read, force it onto the disk, and return the new history.

    `confirm` is called just before, and raises where another process could be writing.
    """
    reason = None if entry.reason is None else _replace_what_is_no_text(entry.reason)
    layout = None if ledger.entries else LAYOUT
    entry = replace(entry, previous_line_sha256=ledger.end_sha256, reason=reason, layout=layout)
    line = json.dumps(entry.fields()).encode() + b"\n"
    with holding_end(folder, ledger) as descriptor:
        confirm()
        _write_all(descriptor, line)
        sync_descriptor(descriptor)
    if ledger.whole_bytes == 0:
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
            "Expected one JSON object a line, as promote and rollback write it. Restore the file "
            "from a backup."
        ) from error


def _check_chain(path: Path, lines: list[bytes], entries: tuple[Entry, ...]) -> str:
    """Check that each line follows the one before; return the hash that the next has to hold."""
    champion: str | None = None
    end_sha256 = NO_LINE_SHA256
    for number, (line, entry) in enumerate(zip(lines, entries, strict=True), 1):
        if entry.previous_line_sha256 != end_sha256:
            before = f"line {number - 1}" if number > 1 else "an empty file"
            raise _broken_chain_error(path, number, f"does not hold the hash of {before}")
        if entry.previous != champion:
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
