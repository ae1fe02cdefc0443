"""Promotion and rollback of a name's champion, each a line of its history.

A version that has changed since it was registered is refused, and automation never promotes a
version that a person rolled back.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError
from nested_core.records.verdict_file import require_passed
from nested_core.registry.judgements import choose_verdict, read_judgements, read_verdicts
from nested_core.registry.ledger import NO_ORIGIN, Origin
from nested_core.registry.link_and_views import NameFolder, writing
from nested_core.registry.promotion_outcome import Decision
from nested_core.registry.registration import NewVersion, registering
from nested_core.registry.versions import VERSION_PREFIX_PATTERN, resolve_version
from nested_core.text.digest_format import shorten_digest


class Unset(Enum):
    """The type of UNSET: any champion is accepted, or no champion at all."""

    UNSET = "unset"


UNSET = Unset.UNSET


def register_and_promote(
    new: NewVersion,
    registry: Path,
    name: str,
    *,
    expected_champion: str | None | Unset = UNSET,
    against_policy: str | None = None,
) -> Decision:
    """Register a run's adapter and make it the champion, the version in use.

    Both happen under one lock, so that no garbage collection removes the version in between.

    expected_champion: if another version is champion, the outcome is "superseded"; UNSET expects
        none in particular.
    against_policy: what the policy requires and the run does not have, for the history.

    Raises what `registering` and `promote_in_folder` raise.
    """
    with registering(new, registry, name) as (locked, manifest):
        fields = {"by": new.by, "manifest": manifest, "against_policy": against_policy}
        return promote_in_folder(locked, new.run.version, expected_champion, fields)


def promote_in_folder(
    locked: NameFolder, version: str, expected: str | None | Unset, fields: dict[str, Any]
) -> Decision:
    """Promote a version whose files were verified under the lock that `locked` holds.

    expected: the champion that the caller knows of; if another is champion, the outcome is
        "superseded". UNSET expects none in particular.
    fields: further fields of the history's line. With `automatic`, a version that a rollback
        replaced is not promoted: the outcome is "barred".

    Raises GateRejected if the version's verdict is "failed"; of several, the newest that compared
    it with the present champion counts.
    """
    before = locked.champion
    if version != before and fields.get("automatic") and version in locked.ledger.barred_versions():
        return Decision("barred", version, before)
    judgement = None
    if read_judgements(locked.path, version, locked.ledger):
        newest = choose_verdict(read_verdicts(locked.path, version, locked.ledger), before)
        require_passed(newest.verdict, locked.version_path(version))
        judgement = newest.sha256
    if version == before:
        return Decision("already_champion", version, before)
    if not _is_expected_champion(before, expected):
        return Decision("superseded", version, before)
    locked.record("promote", version, judgement=judgement, **fields)
    return Decision("promoted", version, before, against_policy=fields.get("against_policy"))


def rollback(
    registry: Path,
    name: str,
    *,
    to: str | None = None,
    by: str,
    only_former_champions: bool = False,
    origin: Origin = NO_ORIGIN,
    reason: str | None = None,
) -> Decision:
    """Make an earlier version the champion again, after re-hashing its files.

    The champion is the version in use.

    to: the version; None for the champion before the present one. Promotions and `to` push a
        version on a stack, a rollback without `to` pops one: after A, B, C it goes to B, then to A.
    by: who asks, for the history. origin: the flow that asks, for the history.
    only_former_champions: refuse a version that was never champion.
    reason: for the history.

    Raises ConfigError for a refused version and if no earlier version is left, DamagedError for any
    change on disk.
    """
    with writing(registry, name) as locked:
        before = locked.champion
        target = locked.ledger.rollback_target() if to is None else to
        if target is None:
            raise ConfigError(
                f"{locked.path} has no version to go back to: its champion is "
                f"{shorten_digest(before or 'none')}, and no earlier one is left. Name the "
                "version that you want with --to."
            )
        target = resolve_version(locked.path, target, locked.ledger)
        if only_former_champions and target not in locked.ledger.champion_versions():
            raise ConfigError(
                f"{shorten_digest(target)} was never champion of {name}, and a flow goes back to "
                f"former champions alone. `nested-tune rollback {name} --to` takes any version."
            )
        manifest = locked.verify(target)
        if target == before:
            return Decision("already_champion", target, before)
        fields = {"explicit": to is not None, "reason": reason, **vars(origin)}
        locked.record("rollback", target, by, manifest=manifest, **fields)
        return Decision("rolled_back", target, before)


def _is_expected_champion(champion: str | None, expected: str | None | Unset) -> bool:
    """Return whether the champion's digest begins with `expected`; None expects no champion."""
    if isinstance(expected, Unset):
        return True
    if champion is None or expected is None:
        return champion is expected
    return VERSION_PREFIX_PATTERN.fullmatch(expected) is not None and champion.startswith(expected)
