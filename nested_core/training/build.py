"""From a configuration to an optimizer with its tiers, and a trainer with all it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from nested_core.config.optimizers import optimizer_classes
from nested_core.config.schema import FineTuneConfig
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.errors import ConfigError, DamagedError, DatasetError
from nested_core.models.base_model import base_fingerprint, find_model
from nested_core.optim.clock import Tier
from nested_core.optim.schedules import build_learning_rate
from nested_core.optim.tiered import Tiered
from nested_core.optim.tiers import TierMap, refuse_tiers_never_due
from nested_core.storage.adapter import files_sha256, read_adapter
from nested_core.storage.atomic import file_sha256
from nested_core.storage.checkpoint import latest_checkpoint
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.callbacks import TrainingCallback
from nested_core.training.distributed import SINGLE_PROCESS, World
from nested_core.training.trainer import Trainer

BEGINNINGS = {"initial": "initial/", "initial_files": "its files", "tiers": "tiers.json"}
BEGINNINGS |= {"base": "the base", "data": "the data"}


def build_trainer(
    config: FineTuneConfig,
    run: RunDirectory,
    model: nn.Module,
    splits: dict[str, TokenizedSplit],
    callback: TrainingCallback | None = None,
    world: World = SINGLE_PROCESS,
) -> Trainer:
    """A trainer at the run's last sound checkpoint, or at its start where there is none.

    Raises ConfigError where a tier could never be due.
    """
    if config.training.memory_limit_gb is not None:
        mx.set_memory_limit(int(config.training.memory_limit_gb * 1e9))
    if config.clear_cache_threshold:
        mx.set_cache_limit(config.clear_cache_threshold)
    tiers = TierMap.from_json(json.loads(run.tiers.read_bytes()))
    optimizer = build_optimizer(config, tiers)
    optimizer.init(model.trainable_parameters())
    found = find_beginnings(config, run)
    trainer = Trainer(config, run, model, splits, tiers, optimizer, found, callback, world)
    refuse_tiers_never_due(tiers.frequencies, trainer.method.steps)
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint is not None:
        _refuse_changes(run, checkpoint.state["found"], found)
        trainer.restore(checkpoint)
    return trainer


def find_beginnings(config: FineTuneConfig, run: RunDirectory) -> dict[str, str]:
    """Digests of what training begins from: initial adapter, tiers, base model and data."""
    return {
        "initial": read_adapter(run.initial).digest(),
        "initial_files": files_sha256(run.initial),
        "tiers": file_sha256(run.tiers),
        "base": base_fingerprint(find_model(config.model)),
        "data": json.loads(run.dataset.read_bytes())["digest"],
    }


def _refuse_changes(run: RunDirectory, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """What a run began from may not change while it is stopped."""
    changed = [name for name in before if before[name] != now[name]]
    if not changed:
        return
    message = (
        f"{run.path} cannot be resumed: {' and '.join(BEGINNINGS[name] for name in changed)} "
        f"changed since it began. Bring back what was there, or start a new run."
    )
    raise DatasetError(message) if changed == ["data"] else DamagedError(message)


def build_optimizer(config: FineTuneConfig, tiers: TierMap) -> Tiered:
    """The configured optimizer of mlx.optimizers, with a clock for each tier.

    Raises ConfigError where its arguments or its schedule are unusable.
    """
    section = config.nested
    scales = section.learning_rate_scale or (1.0,) * len(tiers.frequencies)
    decays = section.weight_decay or (None,) * len(tiers.frequencies)
    clocks = [
        Tier(frequency, tiers.names(i), scales[i], decays[i])
        for i, frequency in enumerate(tiers.frequencies)
    ]
    try:
        make_optimizer = partial(
            optimizer_classes()[config.optimizer],
            build_learning_rate(config),
            **config.optimizer_arguments,
        )
        sample = {"w": mx.ones((2, 2))}
        make_optimizer().apply_gradients(sample, sample)  # some arguments fail at a step alone
        return Tiered(
            make_optimizer,
            clocks,
            slow_gradients=section.slow_gradients,
            accumulate=section.accumulate,
            max_grad_norm=config.training.max_grad_norm,
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"optimizer_config or lr_schedule: {error}") from error
