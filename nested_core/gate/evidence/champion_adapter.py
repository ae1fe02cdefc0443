"""Find the champion and the reference at the time of the gate, and a base that fits each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nested_core.config.schema import FineTuneConfig
from nested_core.data.example_digests import TrainedRows
from nested_core.errors import ConfigError
from nested_core.gate.tensors.base_compatibility import base_reasons, fingerprint_reasons
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.measure.losses.left_out_examples import read_version_rows
from nested_core.models.adapter_fit import find_differences, require_recorded_settings
from nested_core.registry import holding_champion, list_versions, read_champion_changes, verify
from nested_core.registry.folders import name_exists
from nested_core.registry.policy import read_reference
from nested_core.registry.versions import version_folder
from nested_core.storage.adapter import Adapter, read_adapter
from nested_core.text.digest_format import shorten_digest


@dataclass(frozen=True, eq=False)
class Champion:
    """A champion or reference version that can be compared with the candidate.

    base: the base model to load its adapter into: the candidate's, or a second one with LoRA
        modules of the champion's rank, scale and keys.
    trained_on: what it and its ancestors were trained on.
    """

    version: str
    adapter: Adapter
    base: LoadedBase
    trained_on: TrainedRows


@dataclass(frozen=True)
class UnusableChampion:
    """A champion or reference that cannot be compared with the candidate, and why."""

    version: str
    problem: str


def find_rival(
    role: Literal["champion", "reference"], base: LoadedBase, candidate: Adapter
) -> Champion | UnusableChampion | None:
    """Read the version that the candidate is compared with, verify it, and find its base.

    base: the run's loaded base, which is used if the version fits it. candidate: the run's adapter.
    role: "champion" is the champion of `registry.name`; "reference" the version that its policy
        names.

    If the candidate already is the champion, its predecessor is used, so that a run that is judged
    again after its promotion gets the same verdict. Returns None without a registry or such a
    version, or if the candidate is the reference. Raises DamagedError if the version's files
    changed since it was registered.
    """
    if (location := base.config.registry.location) is None or not name_exists(*location):
        return None
    registry, name = location
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
        adapter.digest()  # reads the tensors now, while nobody can remove the version
        trained_on = read_version_rows(folder)
    try:
        rival_base = _find_base_for_champion(adapter, base, candidate)
    except ConfigError as error:
        why = " ".join(str(error).split())
        problem = f"the {role} {shorten_digest(version)} does not fit: {why}"
        return UnusableChampion(version, problem)
    return Champion(version, adapter, rival_base, trained_on)


def _find_replaced_champion(registry: Path, name: str, champion: str) -> str | None:
    """Return the version that `champion` replaced when it was promoted.

    None if the last change was no promotion of it, or the replaced version was removed.
    """
    changes = read_champion_changes(registry, name)  # none where the link was made by hand
    if not changes or (changes[-1].action, changes[-1].version) != ("promote", champion):
        return None
    return changes[-1].previous if changes[-1].previous in list_versions(registry, name) else None


def _find_base_for_champion(champion: Adapter, base: LoadedBase, candidate: Adapter) -> LoadedBase:
    """Return a base model that the champion's tensors fit.

    This is the candidate's unless rank, scale or modules differ. Raises ConfigError if the champion
    was made for another base model.
    """
    if reasons := fingerprint_reasons(champion.config, base.folder):
        raise ConfigError(reasons[0].message)
    if find_differences(champion, candidate):
        base = LoadedBase.load(shape_like_adapter(champion, base.config))
    if reasons := base_reasons(champion, base.parameters, base.folder):
        raise ConfigError(reasons[0].message)
    return base


def shape_like_adapter(adapter: Adapter, config: FineTuneConfig) -> FineTuneConfig:
    """Return the run's configuration with the rank, scale and modules of another adapter.

    Raises ConfigError if the adapter's adapter_config.json does not record them.
    """
    require_recorded_settings(adapter)
    recorded = adapter.config.get("lora_parameters") or {}
    settings = {key: recorded[key] for key in ("rank", "scale") if key in recorded}
    keys = recorded.get("keys")
    modules = None if keys is None else tuple(keys)
    lora = config.lora_parameters.model_copy(update=settings | {"modules": modules})
    changes = {
        "fine_tune_type": adapter.config.get("fine_tune_type", "lora"),
        "num_layers": adapter.config.get("num_layers"),
        "lora_parameters": lora,
    }
    return config.model_copy(update=changes)
