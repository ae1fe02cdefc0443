"""Removal of versions that are no longer needed, or are lost, each with a line in the history.

Garbage collection never removes the champion, the version it replaced, the target of a rollback,
the policy's reference and the champions that become it, the versions used last, or a new one that
may still be promoted; nor, of the champion and of such a new one, recent ancestors and all down to
the oldest with stored examples. A version whose folder holds a foreign file stays too. A version
that a rollback has barred stays barred, because the history is never shortened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError, quote_path
from nested_core.registry.data_store import (
    count_unneeded_rows,
    drop_rows,
    find_incomplete_lists,
    find_lost_lists,
    find_rows,
    keeps_examples,
    read_digest_list,
    read_lineage,
    remove_unneeded_rows,
)
from nested_core.registry.folders import DATA_FOLDER_NAME, VERSIONS_FOLDER_NAME, find_name_folder
from nested_core.registry.judgements import has_all_judgements
from nested_core.registry.ledger import CHAMPION_CHANGE_ACTIONS, REMOVAL_ACTIONS, Ledger
from nested_core.registry.link_and_views import read_link, reading, writing
from nested_core.registry.policy import policy_of
from nested_core.registry.promotion_outcome import USES, may_be_promoted
from nested_core.registry.versions import (
    OPTIONAL_FILES,
    VERSION_FILES,
    inspect_version,
    registered_versions,
    resolve_version,
)
from nested_core.rooms.housekeeping.removal import find_reason_to_keep, size_on_disk
from nested_core.storage.atomic import RETIRED_PREFIX, TEMPORARY_PREFIX
from nested_core.text.digest_format import shorten_digest
from nested_core.text.value_format import format_count

DEFAULT_KEPT_VERSIONS = 10
MAY_HAVE_HAD_ROWS = "may have had rows that were taken out of the data store"


@dataclass(frozen=True)
class GarbageReport:
    """What a gc removed, or would remove in a dry run.

    collected: the removed versions, oldest first; kept: the others.
    bytes: the disk space of the removed versions.
    leftovers: temporary files of killed writers.
    rows: how many examples of the data store no version lists any more.
    """

    name: str
    champion: str | None
    collected: tuple[str, ...]
    kept: tuple[str, ...]
    bytes: int
    leftovers: tuple[str, ...]
    rows: int
    is_dry_run: bool


def collect_garbage(
    registry: Path, name: str, *, by: str, keep: int = DEFAULT_KEPT_VERSIONS, dry_run: bool = False
) -> GarbageReport:
    """Remove all versions except the champion, those it may be replaced by, and the newest.

    Kept are: the champion, the version it replaced, the target of a rollback; the `keep` versions
    that were registered or champion last; a version registered less than an hour ago that was never
    champion, since its promotion may be going on; and of the champion's and such a version's
    lineage the `keep` newest, and all down to the oldest whose examples are stored, since later
    runs train on them.

    dry_run: report what would be removed, and remove nothing.
    by: who asks, for the history.

    Raises ConfigError for a negative `keep` and an unknown name, DamagedError for a history, or a
    verdict or provenance of these lineages, that cannot be read.
    """
    if keep < 0:
        raise ConfigError(f"--keep {keep}: expected the number of versions to keep, 0 or more.")
    if dry_run:
        with reading(registry, name) as (folder, ledger):
            return _plan_removals(folder, name, ledger, keep, dry_run=True)
    # Taken first: opening the folder for writing removes what interrupted writers left
    leftovers = _find_leftovers(find_name_folder(registry, name))
    with writing(registry, name) as locked:
        plan = _plan_removals(locked.path, name, locked.ledger, keep, dry_run=False)
        for version in plan.collected:
            locked.record("collected", version, by)
        remove_unneeded_rows(locked.path, locked.ledger.by_version, confirm=locked.confirm)
    return replace(plan, leftovers=leftovers)


def _plan_removals(
    folder: Path, name: str, ledger: Ledger, keep: int, *, dry_run: bool
) -> GarbageReport:
    """Decide which versions a garbage collection removes and keeps, without removing anything.

    Kept are the newest; the champion, what it replaced and what a rollback returns to; the
    policy's reference versions; versions whose promotion may be going on; their ancestors and the
    champion's down to the oldest with stored examples; and folders that cannot be removed.

    keep: how many of the newest versions stay.
    folder: the adapter's folder in the registry, REGISTRY/NAME.
    ledger: the adapter's history.
    """
    versions = registered_versions(folder)
    by_age = sorted(versions, key=lambda version: _last_use(version, ledger), reverse=True)
    needed = {ledger.champion, read_link(folder)}  # both ends of a change that was cut short
    replaced = {change.previous for change in ledger.changes()[-1:]}
    # A promotion of these may be going on
    undecided = {version for version in versions if may_be_promoted(folder, version, ledger)}
    policy = policy_of(folder, ledger)
    references = () if policy is None else policy.reference_versions(ledger)
    kept = {*by_age[:keep], *needed, *replaced, *undecided, *references, ledger.rollback_target()}
    # Ancestors, whose examples later runs train on and avoid
    for head in {ledger.champion, *undecided} - {None}:
        lineage = read_lineage(folder.parent, name, str(head))
        lost = find_lost_lists(folder, lineage)  # they may have examples
        places = [n for n, v in enumerate(lineage, 1) if v in lost or keeps_examples(folder, v)]
        kept |= {*lineage[: max([keep, *places])]}
    paths = {version: folder / VERSIONS_FOLDER_NAME / version for version in versions}
    kept |= {version for version, path in paths.items() if not _is_removable(path)}
    collected = tuple(version for version in reversed(by_age) if version not in kept)
    return GarbageReport(
        name=name,
        champion=ledger.champion,
        collected=collected,
        kept=tuple(version for version in versions if version in kept),
        bytes=sum(size_on_disk(paths[version]) for version in collected),
        leftovers=_find_leftovers(folder),
        rows=count_unneeded_rows(folder, ledger.by_version.keys() - {*collected}),
        is_dry_run=dry_run,
    )


def _is_removable(path: Path) -> bool:
    """Return whether a version's folder holds no foreign file; a link in its place may go too."""
    is_file_of_version = {*VERSION_FILES, *OPTIONAL_FILES}.__contains__
    return path.is_symlink() or find_reason_to_keep(path, is_file_of_version) is None


def _last_use(version: str, ledger: Ledger) -> tuple[int, bool]:
    """Return a sort key for when a version was last registered, judged, promoted or replaced.

    The key is the number of the history line, whatever the clocks were, and whether the version is
    the one that the line makes champion rather than the one it replaces.
    """
    uses = [
        (number, entry.version == version)
        for number, entry in enumerate(ledger.entries)
        if (entry.version == version and entry.action in USES)
        or (entry.previous == version and entry.action in CHAMPION_CHANGE_ACTIONS)
    ]
    return max(uses, default=(len(ledger.entries), True))


def _find_leftovers(folder: Path) -> tuple[str, ...]:
    """Return the temporary files of killed writers; every writer removes them under the lock.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    prefixes = (TEMPORARY_PREFIX, RETIRED_PREFIX)
    names = ("", VERSIONS_FOLDER_NAME, DATA_FOLDER_NAME)
    folders = [folder / name for name in names if (folder / name).is_dir()]
    entries = [entry for path in folders for entry in path.iterdir()]
    leftovers = [entry for entry in entries if entry.name.startswith(prefixes)]
    return tuple(sorted(str(path.relative_to(folder)) for path in leftovers))


def forget(registry: Path, name: str, version: str, *, by: str, reason: str) -> str:
    """Record that a version is lost and remove what is left of its files; return its digest.

    by, reason: who says so and why, for the history.
    version: the digest or its first digits.

    Raises ConfigError for the champion, for a version that is complete, and for an unknown one;
    DamagedError for a registry that is damaged elsewhere.
    """
    if not by.strip() or not reason.strip():
        raise ConfigError("forget: --by and --reason go into the history, and cannot be empty.")
    with writing(registry, name) as locked:
        lost = resolve_version(locked.path, version, locked.ledger)
        _require_lost(locked.path, lost, locked.ledger)
        locked.record("forgotten", lost, by, reason=reason)
    return lost


def forget_rows(
    registry: Path,
    name: str,
    is_listed: Callable[[dict[str, Any]], bool],
    *,
    by: str,
    dry_run: bool = False,
) -> dict[str, int]:
    """Remove the rows for which `is_listed` returns True from the data store.

    The data store holds the examples of an adapter's versions, for later runs.

    The history gets a line for each version that has such rows, with their number only, for each
    that may have had some which are not known, and one for all that were removed. What a version
    has learnt from them stays in its tensors. Raises ConfigError for an unknown name.

    by: who asks, for the history.
    dry_run: count the rows without removing them.

    Returns how many rows were removed, or would be, from each version that had any.
    """
    if dry_run:
        with reading(registry, name) as (folder, ledger):
            forgotten = _find_listed_rows(folder, ledger, find_rows(folder, is_listed))
    else:
        with writing(registry, name) as locked:
            found = find_rows(locked.path, is_listed)
            incomplete = find_incomplete_lists(locked.path, locked.ledger.by_version)
            forgotten = _find_listed_rows(locked.path, locked.ledger, found)
            # A version that was removed may come back: one line, without a version, is for all
            removed = [None for e in locked.ledger.entries if e.action in REMOVAL_ACTIONS]
            reasons = dict.fromkeys([*incomplete, *removed], MAY_HAVE_HAD_ROWS)
            for key, rows in forgotten.items():
                reasons[key] = f"{format_count(len(rows), 'row')} to be taken out of the data store"
            # The lines first: no version that has one gets a row that the store lacks.
            for one, reason in reasons.items():
                locked.record("rows_forgotten", one, by, reason=reason)
            for version, digests in forgotten.items():
                drop_rows(locked.path, version, digests, confirm=locked.confirm)
            versions = locked.ledger.by_version
            remove_unneeded_rows(locked.path, versions, confirm=locked.confirm, dropped=found)
    return {version: len(digests) for version, digests in forgotten.items()}


def _find_listed_rows(folder: Path, ledger: Ledger, digests: set[str]) -> dict[str, set[str]]:
    """Return, for each version that has any, which of these rows it has.

    Those that no list names may be of any version whose list was lost.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    ledger: the adapter's history.
    """
    lists = {version: read_digest_list(folder, version) for version in ledger.by_version}
    found = {version: digests & one.all() for version, one in lists.items() if one is not None}
    unlisted = digests.difference(*found.values())
    found |= dict.fromkeys(find_lost_lists(folder, ledger.by_version), unlisted)
    return {version: rows for version, rows in found.items() if rows}


def _require_lost(folder: Path, version: str, ledger: Ledger) -> None:
    """Raise ConfigError unless a version may be forgotten, because its files are lost or damaged.

    The champion may not be forgotten, nor a version that is complete.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    ledger: the adapter's history.
    """
    shown = shorten_digest(version)
    if version == ledger.champion:
        raise ConfigError(
            f"{shown} is the champion of {folder.name}. Make another version champion first "
            f"(`nested-tune rollback {folder.name} --registry {quote_path(folder.parent)} --to "
            f"VERSION`, or promote another run; where there is none, remove "
            f"{folder / 'champion'}); then it can be forgotten."
        )
    version_path = folder / VERSIONS_FOLDER_NAME / version
    findings, _ = inspect_version(version_path, version, ledger.manifest_hashes(version))
    if not findings and has_all_judgements(folder, version, ledger):
        raise ConfigError(
            f"{shown} is whole: nothing of it is lost. `nested-tune gc` removes versions that are "
            f"not needed."
        )
