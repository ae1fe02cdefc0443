"""A version that is lost, and how a person says so: its line in the history, and its files gone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nested_core.errors import ConfigError
from nested_core.registry.folder_lock import exclusive_folder_lock
from nested_core.registry.garbage_collection import delete_version
from nested_core.registry.judgements import has_named_judgement
from nested_core.registry.ledger import new_entry
from nested_core.registry.name_folders import VERSIONS_FOLDER_NAME, find_name_folder
from nested_core.registry.recovery import RegistryState, record_line, recover_after_crash
from nested_core.registry.versions import resolve_version, version_findings
from nested_core.text.digest_format import shorten_digest


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
