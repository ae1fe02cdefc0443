"""The champion and the reference at the time of the gate, and bases that their tensors fit into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nested_core.config.schema import FineTuneConfig
from nested_core.data.example_digests import Digests
from nested_core.errors import ConfigError
from nested_core.gate.tensors.base_compatibility import base_reasons, fingerprint_reasons
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.measure.losses.left_out_examples import read_training_digests
from nested_core.models.adapter_fit import find_differences, require_recorded_settings
from nested_core.registry import (
    holding_champion,
    list_versions,
    read_champion_changes,
    verify,
)
from nested_core.registry.folders import name_exists
from nested_core.registry.policy import read_reference
from nested_core.registry.versions import version_folder
from nested_core.storage.adapter import Adapter, read_adapter
from nested_core.text.digest_format import shorten_digest


@dataclass(frozen=True, eq=False)
class Champion:
    """A champion that can be judged beside the candidate.

    base: the base model to load it into: the candidate's, or one with modules of the champion's own
        rank, scale and keys.
    training_examples: digests of what it and its ancestors were trained on, as far as recorded.
    """

    version: str
    adapter: Adapter
    base: LoadedBase
    training_examples: Digests


@dataclass(frozen=True)
class UnusableChampion:
    """A champion that cannot be judged, and why: it was made for another base."""

    version: str
    problem: str


def find_rival(
    role: Literal["champion", "reference"], base: LoadedBase, candidate: Adapter
) -> Champion | UnusableChampion | None:
    """The champion of `registry.name`, verified, read and fitted to the base; None without one.

    Or the version that the registry's policy names as the reference, likewise.
    Raises DamagedError for a version that is not what was registered.

    Where the candidate is the champion, the champion that it replaced: a run that is judged again
    after its promotion gets the verdict that it had. None if that was removed, and where the
    candidate is the reference.
    """
    path, name = base.config.registry.path, base.config.registry.name
    if path is None or name is None or not name_exists(Path(path), name):
        return None
    registry = Path(path)
    with holding_champion(registry, name) as champion:
        version = champion if role == "champion" else read_reference(registry, name)
        if role == "champion" and version == candidate.digest():
            version = _find_replaced_champion(registry, name, version)
        if version is None or version == candidate.digest():
            return None
        if version not in list_versions(registry, name):
            return UnusableChampion(version, f"the {role} {shorten_digest(version)} is not there")
        folder = version_folder(registry, name, version)
        verify(registry, name, version)
        adapter = read_adapter(folder)
        adapter.digest()
        training_examples = read_training_digests(folder)
    try:
        own_base = _find_base_for_champion(adapter, base, candidate)
    except ConfigError as error:
        problem = (
            f"the {role} {shorten_digest(version)} does not fit: {' '.join(str(error).split())}"
        )
        return UnusableChampion(version, problem)
    return Champion(version, adapter, own_base, training_examples)


def _find_replaced_champion(registry: Path, name: str, champion: str) -> str | None:
    """The champion that the promotion of today's replaced, where it is there still."""
    change = read_champion_changes(registry, name)[-1]
    is_promotion = (change.action, change.version) == ("promote", champion)
    is_there = change.previous in list_versions(registry, name)
    return change.previous if is_promotion and is_there else None


def _find_base_for_champion(champion: Adapter, base: LoadedBase, candidate: Adapter) -> LoadedBase:
    """The base to load the champion into; ConfigError for one that was made for another base."""
    if reasons := fingerprint_reasons(champion.config, base.folder):
        raise ConfigError(reasons[0].message)
    if find_differences(champion, candidate):
        base = LoadedBase.load(shape_like_adapter(champion, base.config))
    if reasons := base_reasons(champion, base.parameters, base.folder):
        raise ConfigError(reasons[0].message)
    return base


def shape_like_adapter(adapter: Adapter, config: FineTuneConfig) -> FineTuneConfig:
    """The configuration of a run, with the rank, scale and modules of another adapter.

    Raises ConfigError where its adapter_config.json does not say them.
    """
    require_recorded_settings(adapter)
    recorded = adapter.config.get("lora_parameters") or {}
    known = {key: recorded[key] for key in ("rank", "scale") if key in recorded}
    keys = recorded.get("keys")
    modules = None if keys is None else tuple(keys)
    lora = config.lora_parameters.model_copy(update=known | {"modules": modules})
    changes = {
        "fine_tune_type": adapter.config.get("fine_tune_type", "lora"),
        "num_layers": adapter.config.get("num_layers"),
        "lora_parameters": lora,
    }
    return config.model_copy(update=changes)
