"""Recovery after a crash: every writer first brings history, champion.json and link to agree.

A change that did not reach the link is marked `aborted`, and a link that was moved by hand to a
sound version `moved`. A history that does not end as champion.json says is refused: what is in it
was not written here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nested_core.errors import DamagedError
from nested_core.registry import champion_files
from nested_core.registry.champion_files import (
    find_disagreement,
    is_last_change_unfinished,
    make_record,
    read_record,
    write_record,
)
from nested_core.registry.folders import VERSIONS_FOLDER_NAME
from nested_core.registry.judgements import clear_leftovers
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
from nested_core.registry.policy_file import finish_policy_change
from nested_core.registry.versions import how_to_mend, require_unchanged_files, verify_version
from nested_core.storage.atomic import remove_leftovers
from nested_core.storage.lock_file import LockFile
from nested_core.storage.strict_files import file_type
from nested_core.text.digest_format import shorten_digest

RECOVERY_AUTHOR = "nested-tune (settling a change that was cut short)"
MOVED_AUTHOR = "nested-tune (the link was found moved by hand)"


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
        champion_files.read_link(folder),
        read_record(folder),
        read_ledger(folder),
    )
    if state.champion is not None and not state.ledger.entries:
        raise DamagedError(
            f"{folder / champion_files.LINK_NAME} points to {shorten_digest(state.champion)}, and "
            f"{folder / LEDGER_NAME} does not say how it became the champion. Restore the history "
            "from a backup, or remove the link and champion.json and promote the version again."
        )
    problem = find_disagreement(folder, state.champion, state.record, state.ledger)
    if problem is not None:
        separator = ", " if problem.message.startswith("line ") else " "
        raise DamagedError(f"{problem.file}{separator}{problem.message}")
    champion, ledger = state.champion, state.ledger
    is_known = not ledger.entries or champion in (ledger.champion, ledger.entries[-1].previous)
    if not is_known and not version_exists(folder, champion):
        raise lost_champion_error(folder, str(champion), ledger)
    return state


def require_sound_champion(folder: Path, state: RegistryState) -> None:
    """Raise DamagedError for a champion whose files are gone, or not those that were hashed."""
    champion = state.champion
    if champion is None:
        return
    if not version_exists(folder, champion):
        raise lost_champion_error(folder, champion, state.ledger)
    place = folder / VERSIONS_FOLDER_NAME / champion
    require_unchanged_files(place, champion, state.ledger.manifest_hashes(champion))


def version_exists(folder: Path, version: str | None) -> bool:
    """Whether there is no version to look for, or its folder is there."""
    return version is None or file_type(folder / VERSIONS_FOLDER_NAME / version) == "directory"


def lost_champion_error(folder: Path, champion: str, ledger: Ledger) -> DamagedError:
    """The error for a link to a version that is not there, with the ways out of it."""
    link, place = folder / champion_files.LINK_NAME, folder / VERSIONS_FOLDER_NAME / champion
    if champion in ledger.champion_versions():
        return DamagedError(
            f"{link} points to {shorten_digest(champion)}, whose folder is gone. "
            f"{how_to_mend(place)} Before a version that is champion can be forgotten, make "
            f"another one champion: `nested-tune rollback {folder.name} --registry {folder.parent} "
            f"--to VERSION`, or promote another run."
        )
    back = f"remove {link}"
    if ledger.champion is not None:
        back = f"`ln -sfn {VERSIONS_FOLDER_NAME}/{ledger.champion} {link}`"
    return DamagedError(
        f"{link} points to {shorten_digest(champion)}, which is no version of {folder.name}: it "
        f"was moved by hand. Put back what the history says: {back}."
    )


def recover_after_crash(folder: Path, lock: LockFile) -> RegistryState:
    """Repair `folder` after a crash and return its state; call only under its lock.

    Raises DamagedError where `read_registry_state` does: nothing is changed then.
    """
    confirm = lock.require_still_at_path
    confirm()
    # What somebody without the lock has prepared can no longer take effect from here on.
    champion_files.rename_links_of_other_writers(folder)
    for place in (folder, folder / VERSIONS_FOLDER_NAME):
        remove_leftovers(place)
    state = read_registry_state(folder)
    clear_leftovers(folder, state.ledger)
    champion, ledger = state.champion, state.ledger
    is_unfinished = is_last_change_unfinished(champion, state.record, ledger)
    if is_unfinished:  # one line ahead at most, at any moment
        write_record(folder, make_record(champion, ledger), confirm=confirm)
    if ledger.torn or ledger.champion != champion:
        entry = _missing_entry(folder, ledger, champion, is_unfinished=is_unfinished)
        if ledger.torn:
            confirm()
            ledger = cut_torn_line(folder, ledger)
        ledger = append(folder, ledger, entry, confirm=confirm)
    record = make_record(champion, ledger)
    if read_record(folder) != record:
        write_record(folder, record, confirm=confirm)
    finish_policy_change(folder, ledger, confirm=confirm)
    confirm()
    champion_files.discard_prepared_links(folder)
    return RegistryState(champion, record, ledger)


def record_line(folder: Path, state: RegistryState, entry: Entry, lock: LockFile) -> RegistryState:
    """Add a line that leaves the champion as it is, and bring champion.json to it."""
    confirm = lock.require_still_at_path
    ledger = append(folder, state.ledger, entry, confirm=confirm)
    record = make_record(state.champion, ledger)
    write_record(folder, record, confirm=confirm)
    return RegistryState(state.champion, record, ledger)


def _missing_entry(
    folder: Path, ledger: Ledger, champion: str | None, *, is_unfinished: bool
) -> Entry:
    """The line that brings the history to `champion`, which the link points to already.

    Where the last line leaves another champion, the link did not follow it yet (then champion.json
    did not either, or the link that was to take its place is still there), or somebody has moved
    the link by hand. What it was moved to is verified first: DamagedError for a version that is not
    what was registered.
    """
    prepared = champion_files.read_prepared_link(folder)
    if ledger.champion == champion:
        return new_entry("aborted", prepared, champion, RECOVERY_AUTHOR)
    last = ledger.entries[-1]
    is_change = last.action in CHAMPION_CHANGE_ACTIONS and last.previous == champion
    if is_change and (is_unfinished or prepared == last.version):
        return new_entry("aborted", last.version, champion, RECOVERY_AUTHOR)
    moved = new_entry("moved", champion, ledger.champion, MOVED_AUTHOR)
    if champion is None:
        return moved
    place = folder / VERSIONS_FOLDER_NAME / champion
    manifest = verify_version(place, champion, ledger.manifest_hashes(champion))
    return replace(moved, manifest=manifest)
