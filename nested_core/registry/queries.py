"""Read-only queries: the champion of a name, its versions and its history."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DamagedError, NestedTuneError
from nested_core.models.base_model import TrainedTokenizer
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry.folders import (
    VERSIONS_FOLDER_NAME,
    find_name_folder,
    name_exists,
    shared_folder_lock,
)
from nested_core.registry.ledger import REGISTRATION_ACTIONS, Entry, read_ledger
from nested_core.registry.link_and_views import (
    lost_champion_error,
    read_link,
    reading,
    version_exists,
    writing,
)
from nested_core.registry.registration import require_sound_champion
from nested_core.registry.versions import (
    PROVENANCE_NAME,
    how_to_mend,
    registered_versions,
    resolve_version,
    verify_version,
    version_folder,
)
from nested_core.storage.adapter import Adapter, read_adapter
from nested_core.storage.canary_file import CANARY_NAME, Canary, parse_canary
from nested_core.storage.manifest import read_manifest
from nested_core.storage.untrusted_files import read_regular


def read_champion(registry: Path, name: str) -> str | None:
    """Return the version that the `champion` link points to; None before the first promotion.

    Raises ConfigError for an unknown registry or name, DamagedError for a link to anything but a
    version that exists.
    """
    folder = find_name_folder(registry, name)
    champion = read_link(folder)
    if version_exists(folder, champion):
        return champion
    # A concurrent gc may have removed the version since the link was read: read again, locked.
    with holding_champion(registry, name) as locked_champion:
        return locked_champion


@contextmanager
def holding_champion(registry: Path, name: str) -> Iterator[str | None]:
    """Yield what `read_champion` returns; no gc removes that version while the block runs."""
    folder = find_name_folder(registry, name)
    with shared_folder_lock(folder):
        champion = read_link(folder)
        if champion is not None and not version_exists(folder, champion):
            raise lost_champion_error(folder, champion, read_ledger(folder))
        yield champion


def list_versions(registry: Path, name: str) -> list[str]:
    """Return the digest of every registered version, sorted."""
    return registered_versions(find_name_folder(registry, name))


def parent_version_of(config: FineTuneConfig, initial_digest: str) -> str | None:
    """Return the registered version whose adapter a run continued from.

    initial_digest: digest of the adapter that training started with.

    Returns None if the run started with a fresh adapter, or from one that is not in its registry.
    """
    location = config.registry.location
    if location is None or not name_exists(*location):
        return None
    return initial_digest if initial_digest in list_versions(*location) else None


def read_champion_changes(registry: Path, name: str, *, since: int = 0) -> list[Entry]:
    """Return the history lines that changed the champion, oldest first.

    since: number of the first history line to look at.
    """
    with reading(registry, name) as (_, ledger):
        return ledger.changes(since)


def verify(registry: Path, name: str, version: str) -> None:
    """Re-hash the files of one version; DamagedError if any has changed since registration."""
    with reading(registry, name) as (folder, ledger):
        recorded = ledger.manifest_hashes(version)
        verify_version(folder / VERSIONS_FOLDER_NAME / version, version, recorded)


@dataclass(frozen=True, eq=False)
class VerifiedVersion:
    """A version as it was registered, in memory; `canary` is None if it was not recorded."""

    version: str
    adapter: Adapter
    canary: Canary | None
    tokenizer: TrainedTokenizer


def read_verified_version(registry: Path, name: str, prefix: str) -> VerifiedVersion:
    """Read one version into memory and check it against the hashes of its registration.

    prefix: the version's digest, or the first digits of the digest.

    The hashes are taken of the bytes that are returned, so a change of the files during the read
    is noticed. Raises ConfigError if `prefix` matches no version or several, DamagedError if the
    version has changed since it was registered.
    """
    with reading(registry, name) as (folder, ledger):
        version = resolve_version(folder, prefix, ledger)
        version_path = folder / VERSIONS_FOLDER_NAME / version
        verify_version(version_path, version, ledger.manifest_hashes(version))
        adapter = read_adapter(version_path)
        tokenizer = TrainedTokenizer.read(version_path / PROVENANCE_NAME)
        listed = read_manifest(version_path)["files"].get(CANARY_NAME)
        content = b"" if listed is None else read_regular(version_path / CANARY_NAME)
    is_listed = listed is None or hashlib.sha256(content).hexdigest() == listed["sha256"]
    if adapter.digest() != version or not is_listed:
        raise DamagedError(f"{version_path} changed while it was read. {how_to_mend(version_path)}")
    canary = None if listed is None else parse_canary(content, version_path / CANARY_NAME)
    return VerifiedVersion(version, adapter, canary, tokenizer)


def read_rollback_target(registry: Path, name: str) -> str | None:
    """Return the version that a rollback without `to` would restore; None without one."""
    with reading(registry, name) as (_, ledger):
        return ledger.rollback_target()


def check_champion(registry: Path, name: str) -> str | None:
    """Verify the champion's files and the hash chain of the history; return the champion.

    None means that the name has no champion yet. A file whose device, inode, size and change time
    are unchanged is hashed again only after a day. If a person moved the `champion` link by hand,
    the move is recorded in the history. Raises DamagedError if anything was changed or lost.
    """
    with writing(registry, name) as locked:
        require_sound_champion(locked)
        return locked.champion


def read_version_verdicts(registry: Path, name: str) -> dict[str, Verdict]:
    """Map each version to the verdict that it was registered with.

    Versions with an unreadable verdict are left out; `audit` reports them.
    """
    verdicts = {}
    for version in registered_versions(find_name_folder(registry, name)):
        with suppress(NestedTuneError):
            verdicts[version] = read_verdict(version_folder(registry, name, version) / GATE_NAME)
    return verdicts


def history(registry: Path, name: str) -> list[dict[str, Any]]:
    """Return the lines of an adapter name's history.jsonl as dictionaries, oldest first.

    Lines about registration and judgement are left out, and so is a torn last line. The last
    dictionary has `"unfinished": True` if the `champion` link does not point to the champion of
    the history: either a crash came between the two writes, or a person moved the link by hand.
    """
    folder = find_name_folder(registry, name)
    with shared_folder_lock(folder):
        ledger, champion = read_ledger(folder), read_link(folder)
    lines = [e.fields() for e in ledger.entries if e.action not in REGISTRATION_ACTIONS]
    if lines and ledger.champion != champion:
        lines[-1]["unfinished"] = True
    return lines
