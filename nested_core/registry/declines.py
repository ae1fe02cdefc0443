"""A person's no to a version: recorded in the history, and how far and how long it holds."""

from __future__ import annotations

from pathlib import Path

from nested_core.registry.history_views import reading, writing
from nested_core.registry.judgements import read_verdicts
from nested_core.registry.ledger import CHAMPION_CHANGE_ACTIONS, NO_ORIGIN, Entry, Ledger, Origin
from nested_core.registry.versions import resolve_version


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
    with writing(registry, name) as held:
        declined = resolve_version(held.path, version, held.ledger)
        if find_decline_in_history(held.ledger, declined) is not None:
            return
        facts = read_verdicts(held.path, declined, held.ledger)[-1].facts
        fields = {"dataset_digest": facts.dataset_digest, "settings_digest": facts.settings_digest}
        held.record("declined", declined, by, reason=reason, **fields, **origin.fields())


def find_decline(
    registry: Path, name: str, version: str, dataset_digest: str | None, settings_digest: str | None
) -> Entry | None:
    """The line in which a person declined a version, or one of the same data and settings."""
    with reading(registry, name) as (_, ledger):
        return find_decline_in_history(ledger, version, dataset_digest, settings_digest)


def find_decline_in_history(
    ledger: Ledger,
    version: str,
    dataset_digest: str | None = None,
    settings_digest: str | None = None,
) -> Entry | None:
    """The newest line in which a person declined a version, or one of the same two digests.

    None where somebody has made that version champion since.
    """
    made_of = (dataset_digest, settings_digest)
    for entry in reversed(ledger.entries):
        if entry.version == version and entry.action in CHAMPION_CHANGE_ACTIONS:
            return None
        if entry.action != "declined":
            continue
        is_alike = None not in made_of and made_of == (entry.dataset_digest, entry.settings_digest)
        if entry.version == version or is_alike:
            return entry
    return None
