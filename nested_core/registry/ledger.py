"""The ledger, history.jsonl: every change of a name is a line of it, and the lines decide.

The file is only appended to. Each line holds the SHA-256 of the line before it, and champion.json
that of the last line, so every reader detects an edit. A last line without its line end was torn by
a crash: readers ignore it, and the next writer removes it. Any other line that cannot be read, or
does not follow the one before it, is damage.
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
from itertools import dropwhile, groupby
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from nested_core.errors import DamagedError, MissingFileError, describe_first_problem, quote_path
from nested_core.storage.atomic import Confirm, closing_descriptor, sync_descriptor, sync_path
from nested_core.storage.lock_file import lock_open_file
from nested_core.storage.untrusted_files import file_type, read_regular, write_all
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
NULLABLE_FIELDS = ("version", "previous", "manifest")  # any other is left out where it is null


@dataclass(frozen=True)
class Origin:
    """The flow run that asks for a change, and its deployment; None if a person asks."""

    flow_run: str | None = None
    deployment: str | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the history, history.jsonl: a change of one name in the registry.

    action: what was done. These move the champion: `promote`, `rollback`, and `moved` (somebody
        moved the link by hand). `registered`: `version` was added; `judged`: its adapter was judged
        again; `collected`, `forgotten`: it was removed; `restored`: it was lost and registered
        again; `declined`: a person did not approve it; `tried`: a run registered no version;
        `policy`: the name's policy changed; `rows_forgotten`: rows of `version` were removed from
        the data store, or, without one, perhaps of versions that were removed before.
    version: the version concerned; None for `tried`, and for `policy` before the first champion.
    previous: the champion before this line.
    time: UTC, ISO 8601.
    by: who made the change.
    manifest: SHA-256 of the version's manifest.
    automatic: whether a policy promoted, not a person.
    explicit: whether a rollback named its version (`--to`).
    previous_line_sha256: hash of the line before with its line end; of no bytes for the first line.
        `append` sets it.
    judgement: hash of the judgement's file that the line adds, or that a promotion rests on.
    reason: why, as the person or server says; of a `tried` run what the gate found.
    against_policy: what the policy requires and a person's promotion did not have.
    before, after: the policy before and after a change of it.
    flow_run, deployment: the Prefect flow run that made the change.
    dataset_digest, settings_digest: data and settings of the run that was declined or tried. After
        a decline, nobody is asked about another version of the same two.
    conditions_digest: digest of everything that decides the outcome of a run
        (pipeline/continual.py); a run with the same digest is skipped.
    outcome, run, adapter: what became of a `tried` run, its folder's name, for people, and the
        digest of its adapter, by which it is known.
    layout: LAYOUT, in the first line alone.
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
    adapter: str | None = None
    layout: int | None = None

    @property
    def champion_after(self) -> str | None:
        """The champion after this line."""
        return self.version if self.action in CHAMPION_CHANGE_ACTIONS else self.previous

    def fields(self) -> dict[str, Any]:
        """Return the line's JSON object; of fields that are None it has NULLABLE_FIELDS."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None or name in NULLABLE_FIELDS
        }


NO_ORIGIN = Origin()
ENTRY_VALIDATOR = TypeAdapter(Entry)


NO_LINE_SHA256 = hashlib.sha256().hexdigest()


@dataclass(frozen=True)
class Ledger:
    """The history of an adapter name as read from history.jsonl.

    entries: the lines, oldest first.
    whole_bytes: the length of all complete lines.
    torn: the bytes after the last complete line, which a crash left.
    end_sha256: the hash of the last line, which the next line has to hold; of no bytes without
        lines.
    """

    entries: tuple[Entry, ...] = ()
    whole_bytes: int = 0
    torn: bytes = b""
    end_sha256: str = NO_LINE_SHA256

    @property
    def champion(self) -> str | None:
        """The champion (the version in use) after the last line.

        None before the first promotion.
        """
        return self.entries[-1].champion_after if self.entries else None

    def changes(self, since: int = 0) -> list[Entry]:
        """Return the lines that moved the champion, from number `since` (the first is 0) on."""
        return [e for e in self.entries[since:] if e.action in CHAMPION_CHANGE_ACTIONS]

    @cached_property
    def by_version(self) -> dict[str, list[tuple[int, Entry]]]:
        """For each version that still exists, the history lines about it with their numbers from 0.

        A version that was collected or forgotten is left out. The lines of a version that was
        restored begin with its restoration, and then have the later verdicts on it from before,
        unless a verdict that the restoration brought stands for them.
        """
        lines: dict[str, list[tuple[int, Entry]]] = {}
        for number, entry in enumerate(self.entries):
            if entry.version is None or entry.action == "policy":
                continue
            if entry.action in REMOVAL_ACTIONS:
                lines.pop(entry.version, None)
            elif entry.action == "restored":
                before = [] if entry.judgement else lines.get(entry.version, [])
                judged = [(n, line) for n, line in before if line.action == "judged"]
                lines[entry.version] = [(number, entry), *judged]
            else:
                lines.setdefault(entry.version, []).append((number, entry))
        return lines

    def is_removed(self, version: str) -> bool:
        """Return whether a version was collected or forgotten, and not registered again since."""
        return version not in self.by_version and any(e.version == version for e in self.entries)

    def may_lack_rows(self, version: str) -> bool:
        """Return whether rows of a version may have been taken out of the data store."""
        since = dropwhile(lambda e: e.version != version, self.entries)
        return any(e.action == "rows_forgotten" and e.version in (version, None) for e in since)

    def count_forgettings(self) -> int:
        """Return how many lines say that rows were taken out of the data store."""
        return sum(e.action == "rows_forgotten" for e in self.entries)

    def manifest_hashes(self, version: str) -> set[str]:
        """Return the manifest hashes that the history recorded for a version that still exists."""
        return {e.manifest for _, e in self.by_version.get(version, ()) if e.manifest is not None}

    def judgements(self, version: str) -> list[tuple[int, str]]:
        """Return line number and file hash of each verdict on a version after its first."""
        lines = self.by_version.get(version, ())
        actions = ("judged", "restored")
        return [(n, e.judgement) for n, e in lines if e.judgement and e.action in actions]

    def champion_versions(self) -> set[str]:
        """Return every version that was champion and was not removed since."""
        champions: set[str] = set()
        for entry in self.entries:
            if entry.version is not None and entry.action in CHAMPION_CHANGE_ACTIONS:
                champions.add(entry.version)
            elif entry.version is not None and entry.action in REMOVAL_ACTIONS:
                champions.discard(entry.version)
        return champions

    def rollback_target(self) -> str | None:
        """Return the version that a rollback without `--to` restores; None if no version is left.

        It is found by going through the history's lines, oldest first, with a stack of champions.
        Promotions and `rollback --to` push a version on a stack, a plain rollback pops one, and a
        removed version is taken out. Other lines do not change the stack, so after a link was moved
        by hand the target is the champion before that move.
        """
        stack: list[str] = []
        for entry in self.entries:
            if entry.action in REMOVAL_ACTIONS and entry.version in stack:
                # Equal neighbours become one: a rollback has to change the champion
                stack = [v for v, _ in groupby(v for v in stack if v != entry.version)]
            elif entry.action not in ("promote", "rollback") or entry.version is None:
                continue
            elif (  # a plain rollback, to the version below the top
                entry.action == "rollback"
                and not entry.explicit
                and stack[-2:-1] == [entry.version]
            ):
                stack.pop()
            elif stack[-1:] != [entry.version]:
                stack.append(entry.version)
        # The target is below the champion, which is on top unless the link was moved
        if stack[-1:] == [self.champion]:
            stack.pop()
        return stack[-1] if stack else None

    def barred_versions(self) -> dict[str, Entry]:
        """Return each version that automatic promotion skips, with the rollback that barred it.

        A rollback bars the version that it replaced, until a person promotes that version or goes
        back to it. To go back to a barred version undoes the rollback that barred it. Then the
        version left is barred only if it was promoted after that rollback.
        """
        changes = self.changes()
        barred: dict[str, int] = {}  # by which change
        chosen: dict[str | None, int] = {}  # when it was last promoted, or freed by a rollback
        for number, change in enumerate(changes):
            if change.action != "rollback":
                chosen[change.version] = number
            is_by_person = change.action == "rollback" or not change.automatic
            if change.action == "moved" or change.version is None or not is_by_person:
                continue
            undone = barred.pop(change.version, -1)
            if undone >= 0:
                chosen[change.version] = number
            is_undo = chosen.get(change.previous, -1) < undone
            if change.action == "rollback" and change.previous is not None and not is_undo:
                barred[change.previous] = number
        return {version: changes[number] for version, number in barred.items()}

    def recent_champions(self, promotions: int) -> list[str]:
        """Return the champions of the last `promotions` promotions, oldest first.

        The champion before the first of these promotions comes first of all. Versions that were
        removed, or that a rollback replaced, are left out.
        """
        last = [change for change in self.changes() if change.action == "promote"][-promotions:]
        # The champion before these promotions, then the promoted ones
        versions = [*(change.previous for change in last[:1]), *(change.version for change in last)]
        usable = self.champion_versions() - self.barred_versions().keys()
        return [version for version in versions if version in usable]

    def policy(self) -> dict[str, Any] | None:
        """Return the adapter name's policy after its last change; None if it was never set."""
        return next((e.after for e in reversed(self.entries) if e.action == "policy"), None)


def describe_author(line: Mapping[str, object]) -> str:
    """Return who made a change, with the reason if one was given.

    line: the JSON object of a history line.
    """
    return f"{line['by']}: {line['reason']}" if line.get("reason") else str(line["by"])


def new_entry(
    action: Action, version: str | None, previous: str | None, by: str, **more: Any
) -> Entry:
    """Create a history line with the present time (UTC).

    version: the version concerned. previous: the champion before the line.
    by: who makes the change; characters that are not encodable are replaced by '?'.
    more: further fields of Entry.
    """
    return Entry(
        action=action,
        version=version,
        previous=previous,
        time=datetime.now(UTC).isoformat(timespec="microseconds"),
        by=_replace_what_is_no_text(by),
        **more,
    )


def _replace_what_is_no_text(typed: str) -> str:
    """Replace characters that UTF-8 cannot encode (lone surrogates) by '?'."""
    return typed.encode(errors="replace").decode()


def read_ledger(folder: Path) -> Ledger:
    """Read the history of an adapter name's folder; DamagedError names the first damaged line.

    Without a file the history is empty. A last line without its end, which a crash leaves, is not
    damage: it is returned apart, as `torn`.
    """
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
    *lines, torn = content.split(b"\n")  # torn is empty if the last line is complete
    entries = tuple(_parse_entry(line, path, number) for number, line in enumerate(lines, 1))
    whole_bytes = len(content) - len(torn)
    if entries and entries[0].layout is None and entries[0].previous_line_sha256 == NO_LINE_SHA256:
        raise old_layout_error(folder)
    return Ledger(entries, whole_bytes, torn, _check_chain(path, lines, entries))


def old_layout_error(folder: Path) -> DamagedError:
    """Build the error for a history of an earlier release, which has no lines for registrations.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    return DamagedError(
        f"{folder / LEDGER_NAME} is of an earlier nested-tune, and does not say what was "
        f"registered: move the folder {folder.name} away, and give `nested-tune promote RUN_DIR "
        f"--registry {quote_path(folder.parent)} --name {folder.name}` for each run to be in it."
    )


@contextmanager
def opened_for_append(folder: Path, ledger: Ledger) -> Iterator[int]:
    """Open the history for appending, locked until the block ends; yield the file descriptor.

    Raises DamagedError if the file is longer or shorter than `ledger`: another process then writes
    without the folder's lock.
    """
    path = folder / LEDGER_NAME
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with closing_descriptor(os.open(path, flags, 0o666)) as descriptor:
        lock_open_file(descriptor, path)
        size = os.fstat(descriptor).st_size
        if size != ledger.whole_bytes:
            raise DamagedError(
                f"{path} had {ledger.whole_bytes} bytes when it was read under the lock, and has "
                f"{size} now: something writes to it without the lock. Nothing was changed."
            )
        yield descriptor


def append(folder: Path, ledger: Ledger, entry: Entry, *, confirm: Confirm) -> Ledger:
    """Append a line to the history, force it to disk, and return the new history.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    confirm: called just before the write; it raises if another process could be writing.
    """
    reason = None if entry.reason is None else _replace_what_is_no_text(entry.reason)
    layout = None if ledger.entries else LAYOUT
    entry = replace(entry, previous_line_sha256=ledger.end_sha256, reason=reason, layout=layout)
    line = json.dumps(entry.fields()).encode() + b"\n"
    with opened_for_append(folder, ledger) as descriptor:
        confirm()
        write_all(descriptor, line)
        sync_descriptor(descriptor)
    if ledger.whole_bytes == 0:
        sync_path(folder)
    end_sha256 = hashlib.sha256(line).hexdigest()
    return Ledger((*ledger.entries, entry), ledger.whole_bytes + len(line), b"", end_sha256)


def cut_torn_line(folder: Path, ledger: Ledger) -> Ledger:
    """Remove what a crash left after the last complete line; return the history without it.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    flags = os.O_WRONLY | os.O_NOFOLLOW
    with closing_descriptor(os.open(folder / LEDGER_NAME, flags)) as descriptor:
        os.ftruncate(descriptor, ledger.whole_bytes)
        sync_descriptor(descriptor)
    return replace(ledger, torn=b"")


def _parse_entry(line: bytes, path: Path, number: int) -> Entry:
    """Parse a line of the history; DamagedError with its number (from 1) if it has another form."""
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
    """Check that no history line was edited, removed or added; return the hash of the last line.

    Each line must hold the hash of the line before it and the champion after it. Raises
    DamagedError.

    lines: the bytes of each line. entries: the same lines, parsed.
    """
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
    """Build the error for a line that does not follow from the one before it."""
    return DamagedError(
        f"{path}, line {number} {problem}: a line was removed, added or edited. Nothing is decided "
        "by this history and nothing written to it; restore the file from a backup."
    )
