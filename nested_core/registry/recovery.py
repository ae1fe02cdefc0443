"""Recovery after a crash: every writer first brings the history into agreement with the link.

An interrupted change is marked `aborted`; a history that is behind the link is completed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from nested_core.errors import DamagedError
from nested_core.registry import champion_link
from nested_core.registry.ledger import (
    CHANGES,
    LEDGER_NAME,
    Action,
    Entry,
    Ledger,
    append,
    cut_torn_line,
    new_entry,
    read_ledger,
)
from nested_core.registry.name_folders import VERSIONS
from nested_core.storage.atomic import remove_leftovers

SETTLED_BY = "nested-tune (settling a change that was cut short)"
ROLLBACK_LINE = b'{"action": "rollback"'


@dataclass(frozen=True)
class State:
    """The champion of a name, and a history that agrees with it."""

    champion: str | None
    ledger: Ledger


def recover(folder: Path) -> State:
    """Repair `folder` after a crash and return its state; call only under its lock.

    Raises DamagedError if there is a champion that no history knows of.
    """
    champion = champion_link.read_link(folder)
    ledger = read_ledger(folder)
    if champion is not None and not ledger.entries:
        raise DamagedError(
            f"{folder / champion_link.LINK_NAME} points to {champion[:12]}, and "
            f"{folder / LEDGER_NAME} does not say how it became the champion. Restore the history "
            "from a backup, or remove the link and promote the version again."
        )
    if ledger.torn or ledger.champion != champion:
        ledger = _complete_history(folder, ledger, champion)
    record = champion_link.make_record(champion, ledger.changes())
    if champion_link.read_record(folder) != record:
        champion_link.write_record(folder, record)
    champion_link.discard_prepared(folder)
    for place in (folder, folder / VERSIONS):
        remove_leftovers(place)
    return State(champion, ledger)


def _complete_history(folder: Path, ledger: Ledger, champion: str | None) -> Ledger:
    if ledger.torn:
        cut_torn_line(folder, ledger)
    append(folder, _missing_entry(folder, ledger, champion))
    return read_ledger(folder)


def _missing_entry(folder: Path, ledger: Ledger, champion: str | None) -> Entry:
    """The line that brings the history to `champion`, which the link points to already.

    A prepared link is left only by a change that did not reach the link. Without one, a torn line
    or a link that no line leads to means that the link moved and its line was lost.
    """
    prepared = champion_link.read_prepared(folder)
    if ledger.champion == champion:
        return new_entry("aborted", prepared, champion, SETTLED_BY)
    last = ledger.entries[-1]
    was_begun = last.action in CHANGES and last.previous == champion
    if was_begun and (prepared is not None or not ledger.torn):
        return new_entry("aborted", last.version, champion, SETTLED_BY)
    action: Action = "rollback" if ledger.torn.startswith(ROLLBACK_LINE) else "promote"
    completed = new_entry(action, champion, ledger.champion, SETTLED_BY)
    return replace(completed, automatic=action == "promote")
