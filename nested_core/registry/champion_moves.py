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
from nested_core.registry import champion_link
from nested_core.registry.champion_record import make_record, write_record
from nested_core.registry.folder_lock import exclusive_folder_lock
from nested_core.registry.ledger import Entry, Ledger, append, new_entry
from nested_core.registry.name_folders import (
    VERSIONS_FOLDER_NAME,
    check_name,
    create_name_folder,
    find_name_folder,
)
from nested_core.registry.recovery import RegistryState, recover_after_crash
from nested_core.registry.registration import add_version, judged_digest
from nested_core.registry.versions import VERSION_PREFIX_PATTERN, resolve_version, verify_version
from nested_core.storage.lock_file import LockFile
from nested_core.text.digest_format import shorten_digest

Outcome = Literal["promoted", "rolled_back", "already_champion", "superseded", "barred"]


class Unset(Enum):
    """The type of UNSET: no champion is expected, not even that there is none."""

    UNSET = "unset"


UNSET = Unset.UNSET


@dataclass(frozen=True)
class Promotion:
    """The outcome of promote or rollback for `version`; `previous` was the champion before it."""

    outcome: Outcome
    version: str
    previous: str | None


def promote(
    registry: Path,
    name: str,
    version: str,
    *,
    by: str,
    expected_champion: str | None | Unset = UNSET,
    automatic: bool = False,
) -> Promotion:
    """Make `version` (a digest or its first 6 digits or more) the champion, after re-hashing it.

    With `expected_champion` the outcome is "superseded" if another version is champion; None
    expects that there is none. An `automatic` promotion of a version that a rollback left is
    "barred". Raises ConfigError for an unknown registry, name or version, DamagedError for any
    change on disk, GateRejected for a verdict that is not "passed".
    """
    folder = find_name_folder(registry, name)
    with exclusive_folder_lock(folder) as lock:
        state = recover_after_crash(folder, lock)
        wanted = resolve_version(folder, version, state.ledger)
        change = _PromotionRequest(by, expected_champion, automatic)
        return _promote_locked(folder, wanted, change, state, lock)


def register_and_promote(
    run_dir: Path,
    registry: Path,
    name: str,
    provenance: dict[str, Any],
    *,
    by: str,
    expected_champion: str | None | Unset = UNSET,
) -> Promotion:
    """`register` and `promote` under one lock: no gc comes between the two.

    Raises what the two raise.
    """
    check_name(name)
    version = judged_digest(run_dir)
    folder = create_name_folder(registry, name)
    with exclusive_folder_lock(folder) as lock:
        state = recover_after_crash(folder, lock)
        add_version(folder, version, run_dir, provenance, state=state, lock=lock)
        return _promote_locked(
            folder, version, _PromotionRequest(by, expected_champion), state, lock
        )


@dataclass(frozen=True)
class _PromotionRequest:
    """Who asks for a promotion, and while which champion stands."""

    by: str
    expected_champion: str | None | Unset
    automatic: bool = False


def _promote_locked(
    folder: Path, version: str, change: _PromotionRequest, state: RegistryState, lock: LockFile
) -> Promotion:
    manifest = _verify_version(folder, version, state)
    refusal = _find_refusal(state, version, change.expected_champion, change.automatic)
    if refusal is None:
        entry = new_entry("promote", version, state.champion, change.by)
        entry = replace(entry, manifest=manifest, automatic=change.automatic)
        _record_and_swap(folder, entry, state.ledger, lock)
    return Promotion(refusal or "promoted", version, state.champion)


def rollback(
    registry: Path,
    name: str,
    *,
    to: str | None = None,
    by: str,
    expected_champion: str | None | Unset = UNSET,
) -> Promotion:
    """Make `to`, or the champion before this one, the champion again, after re-hashing it.

    Promotions and `to` push a version on a stack, a rollback without it pops one: after A, B, C it
    goes to B, then to A. With `expected_champion` the outcome is "superseded" if another version is
    champion, so that a second try does not go back twice. Raises ConfigError if nothing is left to
    go back to, DamagedError for any change on disk.
    """
    folder = find_name_folder(registry, name)
    with exclusive_folder_lock(folder) as lock:
        state = recover_after_crash(folder, lock)
        is_expected = isinstance(expected_champion, Unset) or _is_expected_champion(
            state.champion, expected_champion
        )
        if not is_expected and state.champion is not None:
            return Promotion("superseded", state.champion, state.champion)
        wanted = _require_rollback_target(folder, state) if to is None else to
        wanted = resolve_version(folder, wanted, state.ledger)
        manifest = _verify_version(folder, wanted, state)
        if wanted == state.champion:
            return Promotion("already_champion", wanted, state.champion)
        entry = new_entry("rollback", wanted, state.champion, by)
        entry = replace(entry, manifest=manifest, explicit=to is not None)
        _record_and_swap(folder, entry, state.ledger, lock)
    return Promotion("rolled_back", wanted, state.champion)


def _verify_version(folder: Path, version: str, state: RegistryState) -> str:
    return verify_version(
        folder / VERSIONS_FOLDER_NAME / version, version, state.ledger.manifest_hashes(version)
    )


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
    prepared = champion_link.prepare_link(folder, version)
    ledger = append(folder, ledger, entry, confirm=lock.require_still_at_path)
    write_record(folder, make_record(version, ledger), confirm=lock.require_still_at_path)
    champion_link.swap_link(folder, prepared, confirm=lock.require_still_at_path)
