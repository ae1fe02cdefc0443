"""Removal of versions that are no longer needed, or are lost, each with a line in the history.

Garbage collection never removes the champion, what it replaced last, what a rollback would go to,
the policy's reference and the champions that become it,
the versions used last, or one that is new and may still be promoted. A version that a rollback has
barred stays barred, because the history is never shortened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from nested_core.errors import ConfigError
from nested_core.registry import champion_files
from nested_core.registry.folders import (
    VERSIONS_FOLDER_NAME,
    exclusive_folder_lock,
    find_name_folder,
    shared_folder_lock,
)
from nested_core.registry.judgements import (
    JudgementFacts,
    has_named_judgement,
    read_newest_facts,
    remove_judgements,
)
from nested_core.registry.ledger import Ledger, new_entry
from nested_core.registry.policy import read_policy_of_folder
from nested_core.registry.recovery import (
    RegistryState,
    read_registry_state,
    record_line,
    recover_after_crash,
)
from nested_core.registry.versions import registered_versions, resolve_version, version_findings
from nested_core.storage.atomic import (
    RETIRED_PREFIX,
    TEMPORARY_PREFIX,
    remove_leftovers,
    sync_path,
    temporary_beside,
)
from nested_core.storage.lock_file import LockFile
from nested_core.storage.strict_files import file_type
from nested_core.text.digest_format import shorten_digest

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
            # A crash after this leaves a whole version, which the next gc removes; one after the
            # rename in `delete_version` files that every writer clears away.
            entry = new_entry("collected", version, state.champion, by)
            state = record_line(folder, state, entry, lock)
            delete_version(folder, version, lock)
    return replace(plan, leftovers=leftovers)


def _plan_removals(
    folder: Path, name: str, state: RegistryState, keep: int, *, dry_run: bool
) -> GarbageReport:
    ledger = state.ledger
    versions = registered_versions(folder)
    facts = {version: read_newest_facts(folder, version) for version in versions}
    by_age = sorted(versions, key=lambda one: _last_use(one, facts[one], ledger), reverse=True)
    # Both ends of an interrupted change are needed too, and both ends of the last one.
    needed = {state.champion, ledger.champion, champion_files.read_prepared_link(folder)}
    replaced = {change.previous for change in ledger.changes()[-1:]}
    undecided = {one for one in versions if _is_new_and_unpromoted(one, facts[one], ledger)}
    policy = read_policy_of_folder(folder, ledger)
    references = () if policy is None else policy.reference_versions(ledger)
    kept = {*by_age[:keep], *needed, *replaced, *undecided, *references, ledger.rollback_target()}
    collected = tuple(version for version in reversed(by_age) if version not in kept)
    return GarbageReport(
        name=name,
        champion=state.champion,
        collected=collected,
        kept=tuple(version for version in versions if version in kept),
        bytes=sum(
            path.lstat().st_size
            for version in collected
            for path in (folder / VERSIONS_FOLDER_NAME / version).rglob("*")
        ),
        leftovers=_find_leftovers(folder),
        is_dry_run=dry_run,
    )


def _last_use(version: str, facts: JudgementFacts | None, ledger: Ledger) -> tuple[int, int, int]:
    """When a version was registered, became champion or was replaced, whichever came last.

    Told by places in the history, whatever the clocks were: the number of the change, then whether
    the version was replaced in it (0), became champion (1), or was registered after it (2).
    """
    changes = ledger.changes()
    uses = [
        (number, int(change.version == version), 0)
        for number, change in enumerate(changes, 1)
        if version in (change.version, change.previous)
    ]
    since = changes if facts is None else ledger.since(facts.registered_after).changes()
    registration = 0 if facts is None else facts.registration or 0
    return max([(len(changes) - len(since), 2, registration), *uses])


def _is_new_and_unpromoted(version: str, facts: JudgementFacts | None, ledger: Ledger) -> bool:
    """Whether a version is new and was not champion since it was registered.

    One that a person is asked about is new for as long as the question stands. One whose removal
    was cut short, the history says collected and its files are there, is not new.
    """
    if facts is None or version in ledger.champion_versions():
        return False
    if ledger.since(facts.registered_after).is_removed(version):
        return False
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(facts.registered_at)
    except (ValueError, TypeError):  # no time, or one without a zone
        return False
    return age < UNPROMOTED_GRACE_TIME or (
        age < APPROVAL_GRACE_TIME and _waits_for_approval(version, facts, ledger)
    )


def _waits_for_approval(version: str, facts: JudgementFacts, ledger: Ledger) -> bool:
    """Whether the policy of a version, or of its name, leaves it to a person: none has said no."""
    if ledger.find_decline(version, facts.dataset_digest, facts.settings_digest) is not None:
        return False
    modes = ((facts.policy or {}).get("promote"), (ledger.policy() or {}).get("promote"))
    return "approve" in modes and "never" not in modes


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


def forget(registry: Path, name: str, version: str, *, by: str, reason: str) -> str:
    """Record that a version is lost and remove what is left of its files; return the version.

    Raises ConfigError for the champion, for a version that is whole, and for one that neither the
    folder nor the history knows; DamagedError for a registry that is damaged elsewhere.
    """
    if not by.strip() or not reason.strip():
        raise ConfigError("forget: --by and --reason stand in the history, and cannot be empty.")
    folder = find_name_folder(registry, name)
    with exclusive_folder_lock(folder) as lock:
        state = recover_after_crash(folder, lock)
        lost = resolve_version(folder, version, state.ledger)
        _require_lost(folder, lost, state)
        entry = replace(new_entry("forgotten", lost, state.champion, by), reason=reason)
        record_line(folder, state, entry, lock)
        delete_version(folder, lost, lock)
    return lost


def _require_lost(folder: Path, version: str, state: RegistryState) -> None:
    """Raise ConfigError for the champion, and for a version that is as it was registered."""
    shown = shorten_digest(version)
    if version == state.champion:
        raise ConfigError(
            f"{shown} is the champion of {folder.name}. Make another version champion first "
            f"(`nested-tune rollback {folder.name} --registry {folder.parent} --to VERSION`, or "
            f"promote another run; where there is none, remove {folder / 'champion'}); then it can "
            f"be forgotten."
        )
    place = folder / VERSIONS_FOLDER_NAME / version
    findings = version_findings(place, version, state.ledger.manifest_hashes(version))
    if not findings and has_named_judgement(folder, version, state.ledger):
        raise ConfigError(
            f"{shown} is whole: nothing of it is lost. `nested-tune gc` removes versions that are "
            f"not needed."
        )
