"""Recovery after a crash: every writer first brings history, champion.json and link to agree.

A change that did not reach the link is marked `aborted`. A history that does not end as
champion.json says is refused: what is in it was not written here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nested_core.errors import DamagedError
from nested_core.registry import champion_link
from nested_core.registry.champion_record import (
    find_disagreement,
    is_last_change_unfinished,
    make_record,
    read_record,
    write_record,
)
from nested_core.registry.ledger import (
    CHAMPION_CHANGE_ACTIONS,
    LEDGER_NAME,
    Entry,
    Ledger,
    append,
    cut_torn_line,
    new_entry,
    read_ledger,
)
from nested_core.registry.name_folders import VERSIONS_FOLDER_NAME
from nested_core.storage.atomic import remove_leftovers
from nested_core.storage.lock_file import LockFile
from nested_core.text.digest_format import shorten_digest

RECOVERY_AUTHOR = "nested-tune (settling a change that was cut short)"


@dataclass(frozen=True)
class RegistryState:
    """The champion of a name, champion.json, and a history that ends as that says."""

    champion: str | None
    record: dict[str, Any] | None
    ledger: Ledger


def read_registry_state(folder: Path) -> RegistryState:
    """Read link, champion.json and history; call under the folder's lock, shared or not.

    Raises DamagedError for a history that was edited, or a champion that no history knows of.
    """
    state = RegistryState(
        champion_link.read_link(folder),
        read_record(folder),
        read_ledger(folder),
    )
    if state.champion is not None and not state.ledger.entries:
        raise DamagedError(
            f"{folder / champion_link.LINK_NAME} points to {shorten_digest(state.champion)}, and "
            f"{folder / LEDGER_NAME} does not say how it became the champion. Restore the history "
            "from a backup, or remove the link and champion.json and promote the version again."
        )
    problem = find_disagreement(folder, state.champion, state.record, state.ledger)
    if problem is not None:
        separator = ", " if problem.message.startswith("line ") else " "
        raise DamagedError(f"{problem.file}{separator}{problem.message}")
    return state


def recover_after_crash(folder: Path, lock: LockFile) -> RegistryState:
    """Repair `folder` after a crash and return its state; call only under its lock.

    Raises DamagedError where `read_registry_state` does: nothing is changed then.
    """
    confirm = lock.require_still_at_path
    confirm()
    # What somebody without the lock has prepared can no longer take effect from here on.
    champion_link.rename_links_of_other_writers(folder)
    for place in (folder, folder / VERSIONS_FOLDER_NAME):
        remove_leftovers(place)
    state = read_registry_state(folder)
    champion, ledger = state.champion, state.ledger
    if is_last_change_unfinished(
        champion, state.record, ledger
    ):  # one line ahead at most, at any moment
        write_record(folder, make_record(champion, ledger), confirm=confirm)
    if ledger.torn or ledger.champion != champion:
        entry = _missing_entry(folder, ledger, champion)
        if ledger.torn:
            confirm()
            ledger = cut_torn_line(folder, ledger)
        ledger = append(folder, ledger, entry, confirm=confirm)
    record = make_record(champion, ledger)
    if read_record(folder) != record:
        write_record(folder, record, confirm=confirm)
    confirm()
    champion_link.discard_prepared_links(folder)
    return RegistryState(champion, record, ledger)


def _missing_entry(folder: Path, ledger: Ledger, champion: str | None) -> Entry:
    """The line that brings the history to `champion`, which the link points to already.

    Where the last line leaves another champion, the link did not follow it yet, or somebody has
    moved the link by hand.
    """
    if ledger.champion == champion:
        return new_entry(
            "aborted", champion_link.read_prepared_link(folder), champion, RECOVERY_AUTHOR
        )
    last = ledger.entries[-1]
    if last.action in CHAMPION_CHANGE_ACTIONS and last.previous == champion:
        return new_entry("aborted", last.version, champion, RECOVERY_AUTHOR)
    moved = new_entry("promote", champion, ledger.champion, RECOVERY_AUTHOR)
    return replace(moved, automatic=True)
