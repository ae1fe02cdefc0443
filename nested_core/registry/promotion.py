"""Moving the champion: promote and rollback, one at a time, after re-hashing the version.

A version that has changed since it was registered is refused, and automation never brings back a
version that a person rolled back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Literal

from nested_core.errors import ConfigError
from nested_core.registry import champion_link
from nested_core.registry.folder_lock import exclusive
from nested_core.registry.ledger import Entry, append, new_entry
from nested_core.registry.name_folders import VERSIONS, find_name_folder
from nested_core.registry.recovery import State, recover
from nested_core.registry.versions import PREFIX_PATTERN, resolve_version, verify_version

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
    with exclusive(folder):
        state = recover(folder)
        wanted = resolve_version(folder, version, state.ledger)
        manifest = _verify(folder, wanted, state)
        refusal = _refusal(state, wanted, expected_champion, automatic)
        if refusal is None:
            entry = new_entry("promote", wanted, state.champion, by)
            _move(folder, wanted, replace(entry, manifest=manifest, automatic=automatic))
    return Promotion(refusal or "promoted", wanted, state.champion)


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
    with exclusive(folder):
        state = recover(folder)
        is_expected = isinstance(expected_champion, Unset) or _is_expected(
            state.champion, expected_champion
        )
        if not is_expected and state.champion is not None:
            return Promotion("superseded", state.champion, state.champion)
        wanted = _champion_before(folder, state) if to is None else to
        wanted = resolve_version(folder, wanted, state.ledger)
        manifest = _verify(folder, wanted, state)
        if wanted == state.champion:
            return Promotion("already_champion", wanted, state.champion)
        entry = new_entry("rollback", wanted, state.champion, by)
        _move(folder, wanted, replace(entry, manifest=manifest, explicit=to is not None))
    return Promotion("rolled_back", wanted, state.champion)


def _verify(folder: Path, version: str, state: State) -> str:
    return verify_version(folder / VERSIONS / version, version, state.ledger.manifests(version))


def _refusal(
    state: State, version: str, expected: str | None | Unset, automatic: bool
) -> Literal["already_champion", "superseded", "barred"] | None:
    if version == state.champion:
        return "already_champion"
    if automatic and version in state.ledger.barred_versions():
        return "barred"
    if not isinstance(expected, Unset) and not _is_expected(state.champion, expected):
        return "superseded"
    return None


def _is_expected(champion: str | None, expected: str | None) -> bool:
    if champion is None or expected is None:
        return champion is expected
    return PREFIX_PATTERN.fullmatch(expected) is not None and champion.startswith(expected)


def _champion_before(folder: Path, state: State) -> str:
    version = state.ledger.rollback_target()
    if version is None:
        raise ConfigError(
            f"{folder} has no version to go back to: its champion is "
            f"{(state.champion or 'none')[:12]}, and no earlier one is left. Name the version that "
            "you want with --to."
        )
    return version


def _move(folder: Path, version: str, entry: Entry) -> None:
    """Record the change, then make it: a crash in between leaves the old champion standing."""
    champion_link.prepare(folder, version)
    append(folder, entry)
    champion_link.write_record(folder, champion_link.make_record(version, [entry]))
    champion_link.swap(folder)
