"""The champion at the time of the gate, judged on the candidate's held-out examples.

Whatever data the champion was trained or validated on, both are compared on the same examples.
Examples that one of the two, or a version that it was trained from, has seen in training count for
neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nested_core.config.schema import FineTuneConfig
from nested_core.data.example_digests import Digests, decode_digests
from nested_core.errors import ConfigError, DamagedError
from nested_core.gate.base_compatibility import base_reasons, fingerprint_reasons
from nested_core.gate.example_losses import ExampleLosses, Vector
from nested_core.gate.held_out_loss import HeldOutExamples, LoadedBase
from nested_core.gate.run_evidence import RunEvidence
from nested_core.gate.training_examples import read_ancestor_examples, read_training_examples
from nested_core.gate.verdict import ChampionLoss
from nested_core.registry import holding_champion, verify
from nested_core.registry.name_folders import name_exists
from nested_core.registry.versions import version_folder
from nested_core.storage.adapter import Adapter, read_adapter

# What an adapter shares with another one that is loaded into the same modules.
STRUCTURE = ("fine_tune_type", "rank", "scale", "keys", "num_layers")


@dataclass(frozen=True)
class Champion:
    """The champion of the configured name: its adapter, or why it cannot be judged.

    training_examples: digests of what it and its ancestors were trained on, as far as recorded.
    """

    version: str
    adapter: Adapter | None
    training_examples: Digests
    problem: str | None = None


def find_champion(config: FineTuneConfig) -> Champion | None:
    """The champion of `registry.name`, verified and read; None without one."""
    path, name = config.registry.path, config.registry.name
    if path is None or name is None or not name_exists(Path(path), name):
        return None
    registry = Path(path)
    with holding_champion(registry, name) as version:
        if version is None:
            return None
        folder = version_folder(registry, name, version)
        try:
            verify(registry, name, version)
            adapter = read_adapter(folder)
            adapter.digest()
        except (ConfigError, DamagedError) as error:
            problem = f"the champion {version[:12]} is not what was registered: {error}"
            return Champion(version, None, decode_digests(None), problem)
        return Champion(version, adapter, read_training_examples(folder))


@dataclass(frozen=True, eq=False)
class HeldOutComparison:
    """The held-out examples of a run, their losses, and digests of its training examples."""

    held_out: HeldOutExamples
    losses: ExampleLosses
    training_examples: Digests


def compare_with_champion(
    base: LoadedBase, evidence: RunEvidence, examples: HeldOutComparison
) -> tuple[ChampionLoss | None, ExampleLosses]:
    """What gate.json says of the champion, and the losses with the champion's beside them.

    None without a champion. One that cannot be compared is no error: the result says why.
    """
    champion, losses = find_champion(base.config), examples.losses
    if champion is None:
        return None, losses
    version = champion.version
    if champion.adapter is None:
        return ChampionLoss(version, not_compared=champion.problem), losses
    if not np.isfinite(losses.after).all():
        return ChampionLoss(version, not_compared="the candidate's loss is not finite"), losses
    ancestors = read_ancestor_examples(base.config, evidence.before.digest())
    seen = np.concatenate(
        [examples.training_examples, ancestors, champion.training_examples], dtype=np.uint64
    )
    is_seen = np.isin(examples.held_out.digests, seen)
    if is_seen.all():
        problem = (
            f"each of the {len(losses)} held-out examples of {losses.file} is one that the "
            f"champion, the candidate or an ancestor was trained on: nothing is left to compare by"
        )
        return ChampionLoss(version, left_out=len(losses), not_compared=problem), losses
    try:
        measured = _measure(champion.adapter, base, evidence, examples)
    except ConfigError as error:
        problem = f"the champion {version[:12]} does not fit: {' '.join(str(error).split())}"
        return ChampionLoss(version, not_compared=problem), losses
    if not np.isfinite(measured).all():
        problem = f"the loss of the champion {version[:12]} is not finite"
        return ChampionLoss(version, not_compared=problem), losses
    compared = replace(losses, champion=np.where(is_seen, np.nan, measured))
    return ChampionLoss.from_losses(version, compared), compared


def _measure(
    champion: Adapter, base: LoadedBase, evidence: RunEvidence, examples: HeldOutComparison
) -> Vector:
    """The champion's mean loss on each example; of other structure, in a base loaded for it.

    Raises ConfigError for a champion that does not fit the base.
    """
    if champion.digest() == evidence.before.digest():
        return examples.losses.before
    if reasons := fingerprint_reasons(champion.config, base.folder):
        raise ConfigError(reasons[0].message)
    structure, own_structure = champion.meaning(), evidence.after.meaning()
    if any(structure[key] != own_structure[key] for key in STRUCTURE):
        base = LoadedBase.load(_config_of(champion, base.config))
    if reasons := base_reasons(champion, base.parameters, base.folder):
        raise ConfigError(reasons[0].message)
    ((sums, _),) = base.losses((champion.path,), examples.held_out.split)
    measured: Vector = sums[examples.held_out.has_target] / examples.losses.tokens
    return measured


def _config_of(adapter: Adapter, config: FineTuneConfig) -> FineTuneConfig:
    """The configuration of a run, with the rank, scale and modules of another adapter."""
    recorded = adapter.config.get("lora_parameters") or {}
    known = {"rank": recorded.get("rank"), "scale": recorded.get("scale")}
    known = {key: value for key, value in known.items() if value is not None}
    lora = config.lora_parameters.model_copy(update=known | {"modules": recorded.get("keys")})
    changes = {
        "fine_tune_type": adapter.config.get("fine_tune_type", "lora"),
        "num_layers": adapter.config.get("num_layers"),
        "lora_parameters": lora,
    }
    return config.model_copy(update=changes)
