"""What a configuration will do: what is trained, on what, for how long and in how much memory.

The data is validated, the adapter is attached and a few steps are trained in a temporary folder, as
a run would; nothing is kept.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.data.dataset_loading import load_run_data
from nested_core.models.base_model import load_base_model
from nested_core.models.lora_attachment import attach_adapter, load_adapter_tensors
from nested_core.models.parameters import trainable_parameters
from nested_core.models.session import Session
from nested_core.optim.tier_assignment import count_expected_updates
from nested_core.optim.tier_counters import TierStats
from nested_core.pipeline import steps
from nested_core.pipeline.device_lock import OnWait, locking_devices
from nested_core.pipeline.processes import load_services
from nested_core.records.dataset import SplitStats
from nested_core.records.start import read_start
from nested_core.registry.policy import apply_policy
from nested_core.storage.adapter import WEIGHTS_NAME
from nested_core.storage.run_directory import RunDirectory, open_run
from nested_core.storage.safetensors_files import load_arrays
from nested_core.text.stages import stages
from nested_core.training.memory_plan import MemoryPlan
from nested_core.training.trainer import Trainer, make_trainer
from nested_core.training.training_setup import prepare_training


@dataclass(frozen=True)
class RunExplanation:
    """What a run of a configuration will do and cost.

    Attributes:
        config: the configuration with the policy of its registry's name applied.
        tightening: a sentence for each key in which that policy is stricter.
        base_parameters: the base model's parameters as stored; quantised ones count packed.
        tiers: what is trained, tier by tier, with its updates in the whole run.
        splits: what is in each split of the data.
        iterations: micro-batches of the whole run.
        steps: optimizer steps of the whole run.
        epochs: passes over the training data of the whole run.
        validation_examples: examples of an evaluation; 0 without a validation set.
        memory: the predicted peak and the available memory.
        replay: what is replayed, in sentences; empty without replay.
        replayed_tokens: trained tokens of replayed examples in the whole run.
        measured: the measured speed, of the room minutes; None if nothing was measured.
        rate_share: the share of `learning_rate` that it is trained with.
        has_linear_attention: whether modules of `linear_attn`, as in Qwen3.5, are trained.
    """

    config: FineTuneConfig
    tightening: tuple[str, ...]
    base_parameters: int
    tiers: tuple[TierStats, ...]
    splits: dict[str, SplitStats]
    iterations: int
    steps: int
    epochs: float
    validation_examples: int
    memory: MemoryPlan
    replay: tuple[str, ...] = ()
    replayed_tokens: int = 0
    measured: Any = None
    rate_share: float = 1.0
    has_linear_attention: bool = False


def explain_run(
    config: FineTuneConfig, on_wait: OnWait | None = None, *, measures_speed: bool = True
) -> RunExplanation:
    """Find out what a run of this configuration will do: its data, tiers, steps and memory.

    Validates the data and attaches the adapter as a run does, in a temporary run directory. Where
    the registry's policy is stricter than `config`, the policy counts.

    measures_speed: whether to train a few steps, to forecast the time; without the optional part
        nested_core/rooms/minutes nothing is measured.
    on_wait: called with a line if another process holds the device.

    Raises what a run raises before it trains: ConfigError, and DatasetError for data with errors.
    """
    load_services(config)
    config, policy_sentences = apply_policy(config)
    measured = None
    with tempfile.TemporaryDirectory(prefix="nested-tune-") as folder, Session() as session:
        run = open_run(Path(folder) / "run", resume=False)
        with run.locked():
            steps.write_run_config(config, run, resume=False)
            stages.info("explain: reading the data")
            report = steps.validate(config, run)
            replay = tuple(steps.describe_earlier_examples(config, run))
            stages.info("explain: attaching the adapter")
            steps.write_initial_adapter_and_tiers(config, run, on_wait, session=session)
            start = read_start(config, run)
            rate_share = 1.0 if start is None else start.rate_share
            if measures_speed and seams.is_there("minutes"):
                from nested_core.rooms.minutes.forecast import measure_run

                config, measured = measure_run(config, run, session, on_wait)
            session.release_base()  # the trainer loads it again: two may not fit into memory
            with locking_devices(on_wait):
                trainer, base_parameters = _make_trainer(config, run)
    schedule = trainer.step_schedule
    tiers = [
        replace(tier, updates=count_expected_updates(schedule.steps, tier.frequency))
        for tier in trainer.tier_stats()
    ]
    return RunExplanation(
        config=config,
        tightening=tuple(policy_sentences),
        base_parameters=base_parameters,
        tiers=tuple(tiers),
        splits=report.splits,
        iterations=schedule.iterations,
        steps=schedule.steps,
        epochs=schedule.epochs,
        validation_examples=schedule.validation_examples,
        memory=trainer.memory,
        replay=replay,
        replayed_tokens=schedule.count_replayed_tokens(schedule.iterations) or 0,
        measured=measured,
        rate_share=rate_share,
        has_linear_attention=any("linear_attn" in name for name in trainer.setup.parameters),
    )


def _make_trainer(config: FineTuneConfig, run: RunDirectory) -> tuple[Trainer, int]:
    """Build the trainer of the whole run without training; also count the base's parameters."""
    model, tokenizer = load_base_model(config)
    base_parameters = sum(array.size for array in trainable_parameters(model).values())
    _, splits = load_run_data(config, run)
    attach_adapter(model, config)
    load_adapter_tensors(model, load_arrays(run.initial / WEIGHTS_NAME))
    setup = prepare_training(config, run, model, splits, tokenizer=tokenizer)
    return make_trainer(setup), base_parameters
