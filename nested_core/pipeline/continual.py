"""Going on from the champion: the adapter that a run starts from, and whether there is cause to.

Refuses a champion that was trained under another meaning of its tensors (rank, scale, keys, base).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nested_core.config.keys import settings_of_the_adapter
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.models.base import base_fingerprint, find_model
from nested_core.registry import holding_champion, list_versions, read_champion, verify
from nested_core.registry.name_folders import name_exists
from nested_core.registry.promotion_policy import registry_location
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.storage.adapter import Adapter, read_adapter
from nested_core.storage.atomic import canonical_json
from nested_core.storage.run_directory import RunDirectory


def champion_or_none(registry: Path, name: str) -> str | None:
    """The champion's version; None too where registry or name do not exist yet."""
    return read_champion(registry, name) if name_exists(registry, name) else None


def starting_adapter(config: FineTuneConfig, adapter_config: dict[str, Any]) -> Adapter | None:
    """The champion to go on from, verified; None where the run does not, or there is none yet.

    Raises ConfigError where it does not mean what `adapter_config` says, DamagedError where it is
    not what was registered.
    """
    with _champion(config) as champion:
        if champion is None:
            return None
        registry, name = registry_location(config.registry)
        verify(registry, name, champion)
        adapter = read_adapter(version_folder(registry, name, champion))
    found, wanted = adapter.meaning(), Adapter(adapter.path, adapter_config, {}).meaning()
    differing = [f"  {k}: {found[k]}, now {wanted[k]}" for k in found if found[k] != wanted[k]]
    if differing:
        raise ConfigError(
            f"continual.from: the champion {champion[:12]} of {name} was trained with other "
            "settings, and its tensors would mean something else under these:\n"
            + "\n".join(differing)
            + "\nKeep them, or train a new adapter under another name."
        )
    return adapter


def unchanged_since(config: FineTuneConfig, run: RunDirectory) -> str | None:
    """The champion that was trained already on this run's data with these settings, or None.

    None too where the run is not to be skipped: `skip_unchanged` is off, or it has begun to train.
    Raises DamagedError where the champion's provenance cannot be read.
    """
    with _champion(config) as champion:
        if champion is None or not config.continual.skip_unchanged or run.initial.exists():
            return None
        provenance = read_provenance(version_folder(*registry_location(config.registry), champion))
    dataset = json.loads(run.dataset.read_bytes())
    base = base_fingerprint(find_model(config.model))
    now = dataset["splits"]["train"]["digest"], settings_digest(config, base)
    before = provenance.get("train_digest"), provenance.get("settings_digest")
    return champion if now == before else None


def settings_digest(config: FineTuneConfig, base: str | None) -> str:
    """SHA-256 over the base model's fingerprint and every setting that can change the adapter."""
    settings = settings_of_the_adapter(config)
    return hashlib.sha256(canonical_json([base, settings])).hexdigest()


def parent_of(config: FineTuneConfig, initial_digest: str) -> str | None:
    """The registered version that a run was trained from; None where it started fresh."""
    registry, name = registry_location(config.registry)
    if config.continual.start is None or not name_exists(registry, name):
        return None
    return initial_digest if initial_digest in list_versions(registry, name) else None


def describe_start(config: FineTuneConfig, run: RunDirectory) -> str | None:
    """One line on what the initial adapter is, for a run that was to go on from the champion."""
    if config.continual.start is None:
        return None
    parent = parent_of(config, read_adapter(run.initial).digest())
    name = config.registry.name
    if parent is None:
        return f"{name} has no champion yet: starting from a fresh adapter"
    return f"starting from version {parent[:12]} of {name}"


@contextmanager
def _champion(config: FineTuneConfig) -> Iterator[str | None]:
    """The champion to go on from; no gc removes it while the block runs."""
    if config.continual.start is None or not name_exists(*registry_location(config.registry)):
        yield None
        return
    with holding_champion(*registry_location(config.registry)) as champion:
        yield champion
