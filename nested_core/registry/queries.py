"""Read-only queries: the champion of a name, its versions and its history."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError, DamagedError, NestedTuneError
from nested_core.models.base_model import TrainedTokenizer
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry.adapter_card import CARD_NAME
from nested_core.registry.folders import (
    VERSIONS_FOLDER_NAME,
    find_name_folder,
    name_exists,
    shared_folder_lock,
)
from nested_core.registry.history_views import (
    lost_champion_error,
    read_link,
    reading,
    version_exists,
    writing,
)
from nested_core.registry.ledger import REGISTRATION_ACTIONS, Entry, read_ledger
from nested_core.registry.registration import require_sound_champion
from nested_core.registry.versions import (
    how_to_mend,
    read_provenance,
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
    """The version that the `champion` link points to, or None before the first promotion.

    Raises ConfigError for an unknown registry or name, DamagedError for a link to anything but a
    version that exists.
    """
    folder = find_name_folder(registry, name)
    champion = read_link(folder)
    if version_exists(folder, champion):
        return champion
    with holding_champion(registry, name) as now:  # a gc may have removed what it was just now
        return now


def read_champion_card(registry: Path, name: str) -> str:
    """The model card of a name's champion, as it was registered.

    Raises ConfigError for an unknown name or one without a champion, DamagedError if the version
    is not what was registered.
    """
    version = read_champion(registry, name)
    if version is None:
        raise ConfigError(
            f"{registry / name} has no champion yet, and a card is about the champion. Promote a "
            f"run first: nested-tune promote RUN_DIR --registry {registry} --name {name}"
        )
    verify(registry, name, version)
    return read_regular(version_folder(registry, name, version) / CARD_NAME).decode()


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
    """Every registered version, in the order of the digests."""
    return registered_versions(find_name_folder(registry, name))


def parent_version_of(config: FineTuneConfig, initial_digest: str) -> str | None:
    """The registered version that a run was trained from; None if it started fresh."""
    path, name = config.registry.path, config.registry.name
    if config.continual.start is None or path is None or name is None:
        return None
    if not name_exists(Path(path), name):
        return None
    return initial_digest if initial_digest in list_versions(Path(path), name) else None


def read_registration_time(registry: Path, name: str, version: str) -> str | None:
    """When a version was registered, as ISO 8601 (UTC); None if that is not known."""
    with reading(registry, name) as (_, ledger):
        return next((e.time for _, e in ledger.standing.get(version, ())), None)


def read_champion_changes(registry: Path, name: str, *, since: int = 0) -> list[Entry]:
    """Every change of the champion, or those in the lines from number `since`, oldest first."""
    with reading(registry, name) as (_, ledger):
        return ledger.changes(since)


def verify(registry: Path, name: str, version: str) -> None:
    """Re-hash one version; DamagedError if it is not what was registered."""
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
    """Re-hash one version and read it into memory; `prefix` is its digest, or its first digits.

    What is returned has been hashed itself: the adapter's digest is the version. Raises ConfigError
    where `prefix` names no version or several, DamagedError where the version is not what was
    registered.
    """
    with reading(registry, name) as (folder, ledger):
        version = resolve_version(folder, prefix, ledger)
        version_path = folder / VERSIONS_FOLDER_NAME / version
        verify_version(version_path, version, ledger.manifest_hashes(version))
        adapter = read_adapter(version_path)
        provenance = read_provenance(version_path)
        tokenizer = TrainedTokenizer(provenance.get("chat_template"), provenance.get("vocabulary"))
        listed = read_manifest(version_path)["files"].get(CANARY_NAME)
        content = b"" if listed is None else read_regular(version_path / CANARY_NAME)
    is_listed = listed is None or hashlib.sha256(content).hexdigest() == listed["sha256"]
    if adapter.digest() != version or not is_listed:
        raise DamagedError(f"{version_path} changed while it was read. {how_to_mend(version_path)}")
    canary = None if listed is None else parse_canary(content, version_path / CANARY_NAME)
    return VerifiedVersion(version, adapter, canary, tokenizer)


def read_rollback_target(registry: Path, name: str) -> str | None:
    """The version that a rollback without `to` would go to; None if no version is left."""
    with reading(registry, name) as (_, ledger):
        return ledger.rollback_target()


def check_champion(registry: Path, name: str) -> str | None:
    """The champion, after comparing its files, the chain of the history and its end.

    A file that has the device, inode, size and change time that it had when it was hashed is not
    hashed again until a day later. A link that was moved by hand is recorded. Raises DamagedError.
    """
    with writing(registry, name) as held:
        require_sound_champion(held)
        return held.champion


def read_version_losses(registry: Path, name: str) -> dict[str, dict[str, Any]]:
    """Of each version with a held-out loss: `loss` in nats/token, and its `file`.

    They are those of the verdict that it was registered with. A version whose verdict cannot be
    read has none here; `audit` says what is wrong with it.
    """
    folder = find_name_folder(registry, name)
    losses = {}
    for version in registered_versions(folder):
        try:
            verdict = read_verdict(version_folder(registry, name, version) / GATE_NAME)
        except NestedTuneError:
            continue
        validation = verdict.validation
        if validation is not None and validation.loss_after is not None:
            file = validation.file or "held-out examples"
            losses[version] = {"loss": validation.loss_after, "file": file}
    return losses


def history(registry: Path, name: str) -> list[dict[str, Any]]:
    """What was done to a name: the lines of history.jsonl, oldest first, without a torn last line.

    Those that say what was registered and judged are left out. A last line that the link does not
    follow has `"unfinished": true`: a crash came in between, and the next writer finishes, or the
    link was moved by hand.
    """
    folder = find_name_folder(registry, name)
    with shared_folder_lock(folder):
        ledger, champion = read_ledger(folder), read_link(folder)
    lines = [e.fields() for e in ledger.entries if e.action not in REGISTRATION_ACTIONS]
    if lines and ledger.champion != champion:
        lines[-1]["unfinished"] = True
    return lines
