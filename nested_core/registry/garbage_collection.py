"""Garbage collection: removes versions that are no longer needed, each with a line in the history.

It never removes the champion, what it replaced last, what a rollback would go to, the versions
used last, or one that is new and may still be promoted. A version that a rollback has barred stays
barred, because the history is never shortened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from nested_core.errors import ConfigError, DamagedError
from nested_core.registry import champion_link
from nested_core.registry.folder_lock import exclusive_folder_lock, shared_folder_lock
from nested_core.registry.judgements import read_judgements, read_verdicts, remove_judgements
from nested_core.registry.ledger import Ledger, new_entry
from nested_core.registry.name_folders import VERSIONS_FOLDER_NAME, find_name_folder
from nested_core.registry.recovery import (
    RegistryState,
    read_registry_state,
    record_line,
    recover_after_crash,
)
from nested_core.registry.versions import (
    REGISTERED_AFTER_KEY,
    REGISTERED_AT_KEY,
    read_provenance,
    registered_versions,
)
from nested_core.storage.atomic import (
    RETIRED_PREFIX,
    TEMPORARY_PREFIX,
    remove_leftovers,
    sync_path,
    temporary_beside,
)
from nested_core.storage.lock_file import LockFile
from nested_core.storage.strict_files import file_type

DEFAULT_KEPT_VERSIONS = 10
UNPROMOTED_GRACE_TIME = timedelta(hours=1)  # between a version's registration and its promotion
APPROVAL_GRACE_TIME = timedelta(days=7)  # as long as the flow `promote` waits for an answer


@dataclass(frozen=True)
class GarbageReport:
    """The versions that a gc removed, or would remove, and the leftovers of crashes."""

    name: str
    champion: str | None
    collected: tuple[str, ...]
    kept: tuple[str, ...]
    bytes: int
    leftovers: tuple[str, ...]
    is_dry_run: bool


def collect_garbage(
    registry: Path, name: str, *, by: str, keep: int = DEFAULT_KEPT_VERSIONS, dry_run: bool = False
) -> GarbageReport:
    """Remove all versions but the champion, what it replaced, a rollback's target and the newest.

    The newest are the `keep` versions that were registered, or were champion, last. Kept as well is
    a version that was registered less than an hour ago and has not been champion since: its
    promotion may be under way. A dry run only says what would be removed. Raises ConfigError for a
    negative `keep` and an unknown name.
    """
    if keep < 0:
        raise ConfigError(f"--keep {keep}: expected the number of versions to keep, 0 or more.")
    folder = find_name_folder(registry, name)
    if dry_run:
        with shared_folder_lock(folder):
            return _plan_removals(folder, name, read_registry_state(folder), keep, dry_run=True)
    with exclusive_folder_lock(folder) as lock:
        leftovers = _find_leftovers(folder)
        state = recover_after_crash(folder, lock)
        plan = _plan_removals(folder, name, state, keep, dry_run=False)
        for version in plan.collected:
            state = _remove_version(folder, version, state, by, lock)
    return replace(plan, leftovers=leftovers)


def _plan_removals(
    folder: Path, name: str, state: RegistryState, keep: int, *, dry_run: bool
) -> GarbageReport:
    ledger = state.ledger
    versions = registered_versions(folder)
    by_age = sorted(versions, key=lambda version: _last_use(folder, version, ledger), reverse=True)
    # Both ends of an interrupted change are needed too, and both ends of the last one.
    needed = {state.champion, ledger.champion, champion_link.read_prepared_link(folder)}
    replaced = {change.previous for change in ledger.changes()[-1:]}
    undecided = {version for version in versions if _is_new_and_unpromoted(folder, version, ledger)}
    kept = {*by_age[:keep], *needed, *replaced, *undecided, ledger.rollback_target()}
    collected = tuple(version for version in reversed(by_age) if version not in kept)
    return GarbageReport(
        name=name,
        champion=state.champion,
        collected=collected,
        kept=tuple(version for version in versions if version in kept),
        bytes=sum(_folder_size(folder / VERSIONS_FOLDER_NAME / version) for version in collected),
        leftovers=_find_leftovers(folder),
        is_dry_run=dry_run,
    )


def _last_use(folder: Path, version: str, ledger: Ledger) -> tuple[int, int, str]:
    """When a version was registered, became champion or was replaced, whichever came last.

    Told by places in the history, whatever the clocks were: the number of the change, then whether
    the version was replaced in it (0), became champion (1), or was registered after it (2).
    """
    changes = ledger.changes()
    uses = [
        (number, int(change.version == version), "")
        for number, change in enumerate(changes, 1)
        if version in (change.version, change.previous)
    ]
    registered_at, registered_after = _registration_time_and_line(folder, version)
    since = ledger.changes_since(registered_after)
    if since is None:  # registered by an earlier release: the clocks decide
        since = [change for change in changes if change.time > registered_at]
    return max([(len(changes) - len(since), 2, registered_at), *uses])


def _is_new_and_unpromoted(folder: Path, version: str, ledger: Ledger) -> bool:
    """Whether a version is new and was not champion since it was registered.

    One that a person is asked about is new for as long as the question stands. One whose removal
    was cut short, the history says collected and its files are there, is not new.
    """
    if version in ledger.champion_versions():
        return False
    moment, line = _registration_time_and_line(folder, version)
    since = ledger.since(line)
    if since is not None and since.is_removed(version):
        return False
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(moment)
    except (ValueError, TypeError):  # no time, or one without a zone
        return False
    if age < UNPROMOTED_GRACE_TIME:
        return True
    return age < APPROVAL_GRACE_TIME and _waits_for_approval(folder, version, ledger)


def _waits_for_approval(folder: Path, version: str, ledger: Ledger) -> bool:
    """Whether the policy of a version, or of its name, leaves it to a person: none has said no."""
    try:
        facts = read_verdicts(folder, version)[-1].facts
    except (DamagedError, OSError):
        return False
    if ledger.find_decline(version, facts.dataset_digest, facts.settings_digest) is not None:
        return False
    recorded = facts.policy or {}
    modes = (recorded.get("promote"), (ledger.policy() or {}).get("promote"))
    return "approve" in modes and "never" not in modes


def _registration_time_and_line(folder: Path, version: str) -> tuple[str, str]:
    """When a version was registered or last judged again, and after which line.

    Empty strings if it is not known.
    """
    try:
        if judgements := read_judgements(folder, version):
            facts = judgements[-1].facts
            return facts.registered_at, facts.registered_after or ""
        provenance = read_provenance(folder / VERSIONS_FOLDER_NAME / version)
    except (DamagedError, OSError):
        return "", ""  # an audit reports it; here it counts as the oldest
    moment, line = (provenance.get(key) for key in (REGISTERED_AT_KEY, REGISTERED_AFTER_KEY))
    return moment if isinstance(moment, str) else "", line if isinstance(line, str) else ""


def _remove_version(
    folder: Path, version: str, state: RegistryState, by: str, lock: LockFile
) -> RegistryState:
    """Record the removal, hide the version by one rename, then delete it; return the new state.

    A crash after the record leaves a whole version, which the next gc removes; a crash after the
    rename leaves files that every writer clears away.
    """
    entry = new_entry("collected", version, state.champion, by)
    state = record_line(folder, state, entry, lock)
    delete_version(folder, version, lock)
    return state


def delete_version(folder: Path, version: str, lock: LockFile) -> None:
    """Delete the files of a version that the history says is removed, and its judgements."""
    place = folder / VERSIONS_FOLDER_NAME / version
    lock.require_still_at_path()
    if file_type(place) != "missing":
        os.rename(place, temporary_beside(place))
        sync_path(folder / VERSIONS_FOLDER_NAME)
    remove_leftovers(folder / VERSIONS_FOLDER_NAME)
    remove_judgements(folder, version)


def _find_leftovers(folder: Path) -> tuple[str, ...]:
    """Paths that a killed writer left; every writer clears them away under the lock."""
    prefixes = (TEMPORARY_PREFIX, RETIRED_PREFIX)
    places = (folder, folder / VERSIONS_FOLDER_NAME)
    found = [p for place in places for p in place.iterdir() if p.name.startswith(prefixes)]
    return tuple(sorted(str(path.relative_to(folder)) for path in found))


def _folder_size(place: Path) -> int:
    return sum(path.lstat().st_size for path in place.rglob("*"))
