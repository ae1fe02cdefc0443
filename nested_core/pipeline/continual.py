"""Continual training: starts a run from the champion, or skips it if nothing has changed.

A champion whose tensors were trained with another rank, scale, keys or base model is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nested_core.config.key_properties import settings_that_shape_adapter
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.models.base_model import find_model_folder, is_same_base
from nested_core.records.dataset import read_dataset_record
from nested_core.records.verdict import Verdict, describe_examples
from nested_core.registry import holding_champion, read_champion, verify
from nested_core.registry.folders import name_exists
from nested_core.registry.promotion_policy import registry_location
from nested_core.registry.queries import parent_version_of
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.storage.adapter import Adapter, read_adapter
from nested_core.storage.atomic import canonical_json
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.digest_format import shorten_digest
from nested_core.text.loss_format import format_change


def champion_or_none(registry: Path, name: str) -> str | None:
    """The champion's version; None if there is none, or no such registry or name yet."""
    return read_champion(registry, name) if name_exists(registry, name) else None


def starting_adapter(
    config: FineTuneConfig, adapter_config: dict[str, Any], base: Path
) -> Adapter | None:
    """The champion that the run starts from, verified; None if it does not, or there is none yet.

    Raises ConfigError if its configuration is not `adapter_config` or its base is not the model in
    `base`, DamagedError if it is not what was registered.
    """
    with _holding_starting_champion(config) as champion:
        if champion is None:
            return None
        registry, name = registry_location(config.registry)
        verify(registry, name, champion)
        adapter = read_adapter(version_folder(registry, name, champion))
    before = adapter.meaning()
    now = Adapter(adapter.path, adapter_config, {}).meaning()
    recorded = before["base_fingerprint"]
    if recorded is not None and is_same_base(recorded, base):
        now["base_fingerprint"] = recorded  # of the rule by which it was recorded
    differing = [
        f"  {key}: {before[key]}, now {now[key]}" for key in now if before[key] != now[key]
    ]
    if differing:
        raise ConfigError(
            f"continual.from: the champion {shorten_digest(champion)} of {name} was trained "
            "with other settings, and its tensors would mean something else under these:\n"
            + "\n".join(differing)
            + "\nKeep them, or train a new adapter under another name."
        )
    return adapter


def champion_trained_alike(config: FineTuneConfig, run: RunDirectory) -> str | None:
    """The champion, if it was trained on this run's data with the same settings, else None.

    None as well if `continual.skip_unchanged` is off or the run has begun to train.
    Raises DamagedError if the champion's provenance cannot be read.
    """
    with _holding_starting_champion(config) as champion:
        if champion is None or not config.continual.skip_unchanged or run.initial.exists():
            return None
        provenance = read_provenance(version_folder(*registry_location(config.registry), champion))
    train = read_dataset_record(run.dataset).splits["train"]
    base, recorded = find_model_folder(config.model), provenance.get("base_fingerprint")
    if not isinstance(recorded, str) or not is_same_base(recorded, base):
        return None
    now = train.digest, settings_digest(config, recorded)
    before = provenance.get("train_digest"), provenance.get("settings_digest")
    return champion if now == before else None


def settings_digest(config: FineTuneConfig, base: str | None) -> str:
    """SHA-256 over the base model's fingerprint and every setting that can change the adapter."""
    settings = settings_that_shape_adapter(config)
    return hashlib.sha256(canonical_json([base, settings])).hexdigest()


def describe_starting_adapter(config: FineTuneConfig, run: RunDirectory) -> str | None:
    """One line that says where a run with `continual.from` started; None for other runs."""
    if config.continual.start is None:
        return None
    parent = parent_version_of(config, read_adapter(run.initial).digest())
    name = config.registry.name
    if parent is None:
        return f"{name} has no champion yet: starting from a fresh adapter"
    return f"starting from version {shorten_digest(parent)} of {name}"


def find_unbeaten_champion(
    config: FineTuneConfig, run: RunDirectory, verdict: Verdict
) -> str | None:
    """The champion, where an adapter started from it and is no better: `better` keeps that out.

    No better is a mean loss on the held-out examples that is not lower, without a suite whose
    answers got better beyond noise; the gate has passed a rise within its bound, or within noise.
    None without a champion, for another start, and without held-out examples.
    """
    validation = verdict.validation
    if verdict.rival is None or validation is None:
        return None
    before, after = validation.loss_before, validation.loss_after
    if before is None or after is None or after < before:
        return None
    if any(task.is_proven_gain for task in verdict.tasks):
        return None
    initial = verdict.initial.digest
    is_start = verdict.rival in (initial, parent_version_of(config, initial))
    return verdict.rival if is_start else None


def describe_unbeaten_champion(verdict: Verdict, champion: str) -> str:
    """One line that says why nothing was registered, with both losses."""
    change = "no loss"
    if verdict.validation is not None:
        examples = describe_examples(verdict.validation)
        losses = format_change(verdict.validation.loss_before, verdict.validation.loss_after)
        change = f"loss {losses} on {examples}"
    return (
        f"kept the champion {shorten_digest(champion)}: {change}, not better, and within the "
        f"threshold"
    )


@contextmanager
def _holding_starting_champion(config: FineTuneConfig) -> Iterator[str | None]:
    """The champion that the run starts from; no gc removes it while the block runs."""
    if config.continual.start is None or not name_exists(*registry_location(config.registry)):
        yield None
        return
    with holding_champion(*registry_location(config.registry)) as champion:
        yield champion
