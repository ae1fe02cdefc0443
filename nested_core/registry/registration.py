"""Registration: copies a run's judged adapter into the registry, as a version that never changes.

An adapter that the gate did not pass, or that is not the one that it judged, is refused.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nested_core.errors import JUDGE_AGAIN, DamagedError
from nested_core.records.verdict_file import (
    GATE_NAME,
    read_bound_verdict,
    read_verdict,
    require_consistent,
    require_passed,
    require_verdict_manifest,
    require_verdict_on_adapter,
)
from nested_core.registry.adapter_card import CARD_NAME, render_card
from nested_core.registry.folders import (
    VERSIONS_FOLDER_NAME,
    check_name,
    create_name_folder,
    exclusive_folder_lock,
    find_name_folder,
    require_creatable,
)
from nested_core.registry.judgements import (
    has_named_judgement,
    next_registration,
    read_judgements,
    record_judgement,
)
from nested_core.registry.ledger import new_entry
from nested_core.registry.recovery import (
    RegistryState,
    read_registry_state,
    record_line,
    recover_after_crash,
    require_sound_champion,
)
from nested_core.registry.versions import (
    OPTIONAL_FILES,
    PROVENANCE_NAME,
    REGISTERED_AFTER_KEY,
    REGISTERED_AT_KEY,
    REGISTRATION_KEY,
    verify_version,
    version_manifest_facts,
)
from nested_core.storage.adapter import ADAPTER_FILES, read_adapter
from nested_core.storage.atomic import new_directory, write_bytes, write_json
from nested_core.storage.lock_file import LockFile
from nested_core.storage.manifest import read_manifest, write_manifest
from nested_core.storage.strict_files import file_type

ADAPTER_FOLDER_NAME = "adapter"
READ_BITS = 0o444
REGISTRATION_AUTHOR = "nested-tune (a run that was registered again)"
SEARCH_BITS = 0o111


def register(run_dir: Path, registry: Path, name: str, provenance: dict[str, Any]) -> str:
    """Add the adapter of a finished run as a version of `name`; return the version (its digest).

    The provenance is recorded with the time and the end of the history. A sound version that exists
    already stays as it is, with its first verdict and provenance; a further verdict is kept beside
    it, as a judgement.
    Raises ConfigError for a run without a verdict or a bad name, GateRejected if the verdict is not
    "passed", DamagedError if adapter, verdict or an existing version do not agree.
    """
    check_name(name)
    version = judged_digest(run_dir)
    folder = create_name_folder(registry, name)
    with exclusive_folder_lock(folder) as lock:
        state = recover_after_crash(folder, lock)
        add_version(
            folder,
            version,
            run_dir,
            provenance,
            state=state,
            lock=lock,
            by=REGISTRATION_AUTHOR,
            was_judged_now=True,
        )
    return version


def register_rejection(
    run_dir: Path, registry: Path, name: str, provenance: dict[str, Any]
) -> str | None:
    """Keep a verdict that rejects the adapter of a run, where that is a version of `name` already.

    The judgement's hash; None for an adapter that is not registered.
    """
    verdict = read_bound_verdict(run_dir)
    version = verdict.trained.digest
    folder = find_name_folder(registry, name)
    with exclusive_folder_lock(folder) as lock:
        state = recover_after_crash(folder, lock)
        if file_type(folder / VERSIONS_FOLDER_NAME / version) == "missing":
            return None
        return record_judgement(
            folder,
            version,
            verdict,
            provenance | _position(folder, state),
            was_judged_now=True,
            confirm=lock.require_still_at_path,
        )


def _position(folder: Path, state: RegistryState) -> dict[str, str | int]:
    """When, as which, and after which line of the history, something is registered."""
    return {
        REGISTERED_AT_KEY: datetime.now(UTC).isoformat(timespec="microseconds"),
        REGISTRATION_KEY: next_registration(folder),
        REGISTERED_AFTER_KEY: state.ledger.end_sha256,
    }


def require_usable_registry(registry: Path, name: str) -> None:
    """Raise what `register` and `promote` would for the registry itself, and change nothing.

    ConfigError where it cannot be written, DamagedError for a history or champion that is damaged.
    Takes the locks of folders that exist, for a moment.
    """
    require_creatable(registry, name)
    folder = registry / name
    if folder.is_dir():
        with exclusive_folder_lock(folder):
            require_sound_champion(folder, read_registry_state(folder))


def add_version(
    folder: Path,
    version: str,
    run_dir: Path,
    provenance: dict[str, Any],
    *,
    state: RegistryState,
    lock: LockFile,
    by: str,
    was_judged_now: bool,
) -> RegistryState:
    """Copy a run's adapter to `versions/`, or keep its verdict on the version that is there.

    Call under the lock. `version` is the run's `judged_digest`, and `state` what
    `recover_after_crash` returned; the state after it is returned. A version that was champion and
    whose files are lost gets a line `restored`.
    """
    target = folder / VERSIONS_FOLDER_NAME / version
    confirm = lock.require_still_at_path
    position = _position(folder, state)
    restored = new_entry("restored", version, state.champion, by)
    if file_type(target) != "missing":
        manifest = verify_version(target, version, state.ledger.manifest_hashes(version))
        judgement = record_judgement(
            folder,
            version,
            read_bound_verdict(run_dir),
            provenance | position,
            was_judged_now=was_judged_now,
            confirm=confirm,
        )
        if has_named_judgement(folder, version, state.ledger):
            return state
        entry = replace(restored, manifest=manifest, judgement=judgement)
        return record_line(folder, state, entry, lock)
    with new_directory(target, confirm=confirm) as unpublished:
        _fill_version_folder(unpublished, run_dir, folder.name, version, provenance | position)
        manifest = verify_version(unpublished, version, set())
        _make_read_only(unpublished)
        if version in state.ledger.champion_versions():
            # Before the files: cut short in between, the version is as lost as it was.
            state = record_line(folder, state, replace(restored, manifest=manifest), lock)
    if read_judgements(folder, version):  # of the version that was lost: this verdict is newer
        verdict = read_bound_verdict(run_dir)
        recorded = provenance | position
        record_judgement(folder, version, verdict, recorded, was_judged_now=True, confirm=confirm)
    return state


def judged_digest(run_dir: Path) -> str:
    """The digest of the adapter that a finished run offers, which its gate has judged and passed.

    Raises what `register` raises for a run.
    """
    path = run_dir / GATE_NAME
    verdict = read_verdict(path)
    require_passed(verdict, path)
    for file in (run_dir / ADAPTER_FOLDER_NAME / name for name in ADAPTER_FILES):
        if file_type(file) not in ("file", "missing"):  # read_adapter says which file is missing
            raise DamagedError(
                f"{file} is not a regular file: a version is a copy of files that the run itself "
                "wrote."
            )
    digest = read_adapter(run_dir / ADAPTER_FOLDER_NAME).digest()
    require_verdict_on_adapter(verdict, digest, path)
    require_verdict_manifest(run_dir, verdict)
    require_consistent(verdict, path)
    return digest


def _fill_version_folder(
    folder: Path, run_dir: Path, name: str, version: str, provenance: dict[str, Any]
) -> None:
    """Write all files of a version of `name` into its new folder."""
    for file in ADAPTER_FILES:
        shutil.copyfile(run_dir / ADAPTER_FOLDER_NAME / file, folder / file)
    shutil.copyfile(run_dir / GATE_NAME, folder / GATE_NAME)
    verdict = read_verdict(folder / GATE_NAME)
    judged = require_verdict_manifest(run_dir, verdict)
    for file in OPTIONAL_FILES:
        if file in judged:
            shutil.copyfile(run_dir / file, folder / file)
    write_json(folder / PROVENANCE_NAME, provenance)
    card = render_card(name, version, provenance, verdict)
    write_bytes(folder / CARD_NAME, card.encode("utf-8", "replace"))
    write_manifest(folder, version_manifest_facts(version))
    _require_judged_files(folder, run_dir, judged)


def _make_read_only(folder: Path) -> None:
    """Take the right to write from a version's files, and to replace them from its folder.

    They were made under the umask, which says who reads. The folder stays as it is where `versions`
    is a group's: each member of it may remove what another registered.
    """
    for path in folder.iterdir():
        path.chmod(path.stat().st_mode & READ_BITS)
    if not folder.parent.stat().st_mode & stat.S_IWGRP:
        folder.chmod(folder.stat().st_mode & (READ_BITS | SEARCH_BITS))


def _require_judged_files(folder: Path, run_dir: Path, judged: Mapping[str, Any]) -> None:
    """Raise DamagedError unless the copies are of the files that the run's verdict rests on."""
    copied = read_manifest(folder)["files"]
    sources = {name: f"{ADAPTER_FOLDER_NAME}/{name}" for name in ADAPTER_FILES} | {
        name: name for name in (GATE_NAME, *OPTIONAL_FILES) if name in copied
    }
    for name, source in sources.items():
        if copied[name] != judged.get(source):
            raise DamagedError(
                f"{run_dir / source} has changed since the verdict was given: the run's manifest "
                f"holds another digest of it. Bring back what was there; if it is lost:",
                advice=JUDGE_AGAIN,
            )
