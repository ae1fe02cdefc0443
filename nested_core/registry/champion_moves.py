"""Moving the champion: promote and rollback, one at a time, after re-hashing the version.

A version that has changed since it was registered is refused, and automation never brings back a
version that a person rolled back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from nested_core.errors import ConfigError
from nested_core.records.verdict_file import require_passed
from nested_core.registry import champion_files
from nested_core.registry.champion_files import make_record, write_record
from nested_core.registry.decision import Decision
from nested_core.registry.folders import (
    VERSIONS_FOLDER_NAME,
    check_name,
    create_name_folder,
    exclusive_folder_lock,
    find_name_folder,
)
from nested_core.registry.judgements import choose_verdict, read_judgements, read_verdicts
from nested_core.registry.ledger import NO_ORIGIN, Entry, Ledger, Origin, append, new_entry
from nested_core.registry.recovery import RegistryState, record_line, recover_after_crash
from nested_core.registry.registration import add_version, judged_digest
from nested_core.registry.versions import VERSION_PREFIX_PATTERN, resolve_version, verify_version
from nested_core.storage.lock_file import LockFile
from nested_core.text.digest_format import shorten_digest


class Unset(Enum):
    """The type of UNSET: no champion is expected, not even that there is none."""

    UNSET = "unset"


UNSET = Unset.UNSET


class HistoryChanged(Exception):
    """A line was added to the history after a promotion was decided: it is to be decided anew."""


def promote(
    registry: Path,
    name: str,
    version: str,
    *,
    by: str,
    expected_champion: str | None | Unset = UNSET,
    automatic: bool = False,
    against_policy: str | None = None,
    origin: Origin = NO_ORIGIN,
    decided_at: str | None = None,
) -> Decision:
    """Make `version` (a digest or its first 6 digits or more) the champion, after re-hashing it.

    With `expected_champion` the outcome is "superseded" if another version is champion; None
    expects that there is none. An `automatic` promotion of a version that a rollback left is
    "barred". `against_policy` and `origin` stand in the history's line. `decided_at` is the end
    that the history had when the promotion was decided, as `read_history_end` returns it: any other
    raises HistoryChanged. Raises ConfigError for an unknown registry, name or version, DamagedError
    for any change on disk, GateRejected for a verdict that is not "passed".
    """
    folder = find_name_folder(registry, name)
    with exclusive_folder_lock(folder) as lock:
        state = recover_after_crash(folder, lock)
        if decided_at not in (None, state.ledger.end_sha256):
            raise HistoryChanged
        wanted = resolve_version(folder, version, state.ledger)
        change = _PromotionRequest(by, expected_champion, automatic, against_policy, origin)
        return _promote_locked(folder, wanted, change, state, lock)


def register_and_promote(
    run_dir: Path,
    registry: Path,
    name: str,
    provenance: dict[str, Any],
    *,
    by: str,
    expected_champion: str | None | Unset = UNSET,
    against_policy: str | None = None,
) -> Decision:
    """`register` and `promote` under one lock: no gc comes between the two.

    Raises what the two raise.
    """
    check_name(name)
    version = judged_digest(run_dir)
    folder = create_name_folder(registry, name)
    with exclusive_folder_lock(folder) as lock:
        state = recover_after_crash(folder, lock)
        state = add_version(
            folder,
            version,
            run_dir,
            provenance,
            state=state,
            lock=lock,
            by=by,
            was_judged_now=False,
        )
        change = _PromotionRequest(by, expected_champion, against_policy=against_policy)
        return _promote_locked(folder, version, change, state, lock)


@dataclass(frozen=True)
class _PromotionRequest:
    """Who asks for a promotion, and while which champion stands."""

    by: str
    expected_champion: str | None | Unset
    automatic: bool = False
    against_policy: str | None = None
    origin: Origin = NO_ORIGIN


def _promote_locked(
    folder: Path, version: str, change: _PromotionRequest, state: RegistryState, lock: LockFile
) -> Decision:
    manifest = _verify_version(folder, version, state)
    judgement = _newest_passed_judgement(folder, version, state.champion)
    refusal = _find_refusal(state, version, change.expected_champion, change.automatic)
    if refusal is None:
        entry = new_entry("promote", version, state.champion, change.by)
        entry = replace(
            entry,
            manifest=manifest,
            automatic=change.automatic,
            judgement=judgement,
            against_policy=change.against_policy,
            flow_run=change.origin.flow_run,
            deployment=change.origin.deployment,
        )
        _record_and_swap(folder, entry, state.ledger, lock)
    against = None if refusal is not None else change.against_policy
    return Decision(refusal or "promoted", version, state.champion, against_policy=against)


def rollback(
    registry: Path,
    name: str,
    *,
    to: str | None = None,
    by: str,
    expected_champion: str | None | Unset = UNSET,
    only_former_champions: bool = False,
    origin: Origin = NO_ORIGIN,
    reason: str | None = None,
) -> Decision:
    """Make `to`, or the champion before this one, the champion again, after re-hashing it.

    Promotions and `to` push a version on a stack, a rollback without it pops one: after A, B, C it
    goes to B, then to A. With `expected_champion` the outcome is "superseded" if another version is
    champion, so that a second try does not go back twice. With `only_former_champions` a version
    that never was champion is refused: going back is no promotion. `reason` stands in the history's
    line. Raises ConfigError for that and
    if nothing is left to go back to, DamagedError for any change on disk.
    """
    folder = find_name_folder(registry, name)
    with exclusive_folder_lock(folder) as lock:
        state = recover_after_crash(folder, lock)
        is_expected = isinstance(expected_champion, Unset) or _is_expected_champion(
            state.champion, expected_champion
        )
        if not is_expected and state.champion is not None:
            return Decision("superseded", state.champion, state.champion)
        wanted = _require_rollback_target(folder, state) if to is None else to
        wanted = resolve_version(folder, wanted, state.ledger)
        if only_former_champions and wanted not in state.ledger.champion_versions():
            raise ConfigError(
                f"{shorten_digest(wanted)} was never champion of {name}, and a flow goes back to "
                f"former champions alone. `nested-tune rollback {name} --to` takes any version."
            )
        manifest = _verify_version(folder, wanted, state)
        if wanted == state.champion:
            return Decision("already_champion", wanted, state.champion)
        entry = new_entry("rollback", wanted, state.champion, by)
        entry = replace(
            entry,
            manifest=manifest,
            explicit=to is not None,
            reason=reason,
            flow_run=origin.flow_run,
            deployment=origin.deployment,
        )
        _record_and_swap(folder, entry, state.ledger, lock)
    return Decision("rolled_back", wanted, state.champion)


def _verify_version(folder: Path, version: str, state: RegistryState) -> str:
    return verify_version(
        folder / VERSIONS_FOLDER_NAME / version, version, state.ledger.manifest_hashes(version)
    )


def _newest_passed_judgement(folder: Path, version: str, champion: str | None) -> str | None:
    """The hash of the judgement that a promotion rests on; None where the first verdict counts.

    Raises GateRejected where the gate, judging the version again, has rejected it.
    """
    if not read_judgements(folder, version):
        return None
    verdict = choose_verdict(read_verdicts(folder, version), champion)
    require_passed(verdict.verdict, folder / VERSIONS_FOLDER_NAME / version)
    return verdict.sha256


def _find_refusal(
    state: RegistryState, version: str, expected: str | None | Unset, automatic: bool
) -> Literal["already_champion", "superseded", "barred"] | None:
    if version == state.champion:
        return "already_champion"
    if automatic and version in state.ledger.barred_versions():
        return "barred"
    if not isinstance(expected, Unset) and not _is_expected_champion(state.champion, expected):
        return "superseded"
    return None


def _is_expected_champion(champion: str | None, expected: str | None) -> bool:
    """Whether the champion's version begins as expected; None expects that there is none."""
    if champion is None or expected is None:
        return champion is expected
    return VERSION_PREFIX_PATTERN.fullmatch(expected) is not None and champion.startswith(expected)


def _require_rollback_target(folder: Path, state: RegistryState) -> str:
    version = state.ledger.rollback_target()
    if version is None:
        raise ConfigError(
            f"{folder} has no version to go back to: its champion is "
            f"{shorten_digest(state.champion or 'none')}, and no earlier one is left. Name the "
            "version that you want with --to."
        )
    return version


def _record_and_swap(folder: Path, entry: Entry, ledger: Ledger, lock: LockFile) -> None:
    """Record the change, then make it: a crash in between leaves the old champion standing."""
    version = str(entry.version)
    prepared = champion_files.prepare_link(folder, version)
    ledger = append(folder, ledger, entry, confirm=lock.require_still_at_path)
    write_record(folder, make_record(version, ledger), confirm=lock.require_still_at_path)
    champion_files.swap_link(folder, prepared, confirm=lock.require_still_at_path)


def decline(
    registry: Path,
    name: str,
    version: str,
    *,
    by: str,
    reason: str | None = None,
    origin: Origin = NO_ORIGIN,
) -> None:
    """Record that a person did not approve a version; saying so again adds nothing.

    The line has the digests of its data set and settings: no other version of both is asked about.
    """
    folder = find_name_folder(registry, name)
    with exclusive_folder_lock(folder) as lock:
        state = recover_after_crash(folder, lock)
        declined = resolve_version(folder, version, state.ledger)
        if state.ledger.find_decline(declined) is not None:
            return
        facts = read_verdicts(folder, declined)[-1].facts
        entry = new_entry("declined", declined, state.champion, by)
        entry = replace(
            entry,
            reason=reason,
            flow_run=origin.flow_run,
            deployment=origin.deployment,
            dataset_digest=facts.dataset_digest,
            settings_digest=facts.settings_digest,
        )
        record_line(folder, state, entry, lock)
