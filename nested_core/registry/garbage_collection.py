"""Garbage collection: removes versions that are no longer needed, each with a line in the history.

It never removes the champion, what it replaced last, what a rollback would go to, or the versions
used last. A version
that a rollback has barred stays barred, because the history is never shortened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from nested_core.errors import ConfigError, DamagedError
from nested_core.registry import champion_link
from nested_core.registry.folder_lock import exclusive, shared
from nested_core.registry.ledger import Ledger, append, new_entry, read_ledger
from nested_core.registry.name_folders import VERSIONS, find_name_folder
from nested_core.registry.recovery import State, recover
from nested_core.registry.versions import REGISTERED_AT, read_provenance, registered_versions
from nested_core.storage.atomic import (
    RETIRED_PREFIX,
    TEMPORARY_PREFIX,
    remove_leftovers,
    sync_path,
    temporary_beside,
)

DEFAULT_KEEP = 10


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
    registry: Path, name: str, *, by: str, keep: int = DEFAULT_KEEP, dry_run: bool = False
) -> GarbageReport:
    """Remove all versions but the champion, what it replaced, a rollback's target and the newest.

    The newest are the `keep` versions that were registered, or were champion, last. A dry run only
    says what would be removed. Raises ConfigError for a negative `keep` and an unknown name.
    """
    if keep < 0:
        raise ConfigError(f"--keep {keep}: expected the number of versions to keep, 0 or more.")
    folder = find_name_folder(registry, name)
    if dry_run:
        with shared(folder):
            state = State(champion_link.read_link(folder), read_ledger(folder))
            return _plan(folder, name, state, keep, dry_run=True)
    with exclusive(folder):
        leftovers = _leftovers(folder)
        state = recover(folder)
        plan = _plan(folder, name, state, keep, dry_run=False)
        for version in plan.collected:
            _remove(folder, version, state.champion, by)
    return replace(plan, leftovers=leftovers)


def _plan(folder: Path, name: str, state: State, keep: int, *, dry_run: bool) -> GarbageReport:
    ledger = state.ledger
    versions = registered_versions(folder)
    by_age = sorted(versions, key=lambda version: _last_use(folder, version, ledger), reverse=True)
    # Both ends of an interrupted change are needed too, and both ends of the last one.
    needed = {state.champion, ledger.champion, champion_link.read_prepared(folder)}
    replaced = {change.previous for change in ledger.changes()[-1:]}
    kept = {*by_age[:keep], *needed, *replaced, ledger.rollback_target()}
    collected = tuple(version for version in reversed(by_age) if version not in kept)
    return GarbageReport(
        name=name,
        champion=state.champion,
        collected=collected,
        kept=tuple(version for version in versions if version in kept),
        bytes=sum(_size(folder / VERSIONS / version) for version in collected),
        leftovers=_leftovers(folder),
        is_dry_run=dry_run,
    )


def _last_use(folder: Path, version: str, ledger: Ledger) -> tuple[str, bool]:
    """When a version was registered, became champion or was replaced, whichever came last.

    The second value puts the version that a change made champion after the one that it replaced.
    """
    times = [
        (change.time, change.version == version)
        for change in ledger.changes()
        if version in (change.version, change.previous)
    ]
    return max([(_registered_at(folder / VERSIONS / version), True), *times])


def _registered_at(place: Path) -> str:
    try:
        moment = read_provenance(place).get(REGISTERED_AT)
    except (DamagedError, OSError):
        return ""  # an audit reports it; here it counts as the oldest
    return moment if isinstance(moment, str) else ""


def _remove(folder: Path, version: str, champion: str | None, by: str) -> None:
    """Record the removal, hide the version by one rename, then delete it.

    A crash after the record leaves a whole version, which the next gc removes; a crash after the
    rename leaves files that every writer clears away.
    """
    append(folder, new_entry("collected", version, champion, by))
    place = folder / VERSIONS / version
    os.rename(place, temporary_beside(place))
    sync_path(folder / VERSIONS)
    remove_leftovers(folder / VERSIONS)


def _leftovers(folder: Path) -> tuple[str, ...]:
    """Paths that a killed writer left; every writer clears them away under the lock."""
    prefixes = (TEMPORARY_PREFIX, RETIRED_PREFIX)
    places = (folder, folder / VERSIONS)
    found = [p for place in places for p in place.iterdir() if p.name.startswith(prefixes)]
    return tuple(sorted(str(path.relative_to(folder)) for path in found))


def _size(place: Path) -> int:
    return sum(path.lstat().st_size for path in place.rglob("*"))
