"""Build everything that a run trains with from its configuration, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import optimizer_classes
from nested_core.data.data_settings import REPLAY_SPLIT
from nested_core.data.earlier_examples import find_earlier_examples
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.errors import ConfigError
from nested_core.models.base_model import find_model_folder, fingerprint_base_model
from nested_core.models.chat_template import Tokenizer
from nested_core.models.lora_attachment import adapter_compute_dtype
from nested_core.models.parameters import ParameterRefs, reference_trainable_parameters
from nested_core.optim.learning_rate_schedules import build_learning_rate
from nested_core.optim.tier_assignment import TierMap, refuse_tiers_never_due
from nested_core.optim.tier_counters import Tier
from nested_core.optim.tiered import Tiered
from nested_core.optim.tiers_file import read_tiers
from nested_core.records.dataset import read_dataset_record
from nested_core.records.start import read_start
from nested_core.storage.adapter import files_sha256, read_adapter
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import regular_sha256
from nested_core.training.evaluation import Prompts, choose_prompts
from nested_core.training.loss.loss_interface import Loss
from nested_core.training.reports.sample_prompts import SamplePrompts
from nested_core.training.reports.training_callback import TrainingCallback
from nested_core.training.schedule.step_schedule import StepSchedule, make_step_schedule
from nested_core.training.world import SINGLE_PROCESS_WORLD, World


class Questions(Protocol):
    """Questions to ask at evaluations, see measure/answers/questions_in_training.py."""

    def ask(
        self,
        model: nn.Module,
        refs: ParameterRefs,
        values: Mapping[str, mx.array],
        check_stop: Callable[[], None],
        share: float,
    ) -> dict[str, Any]:
        """Return `tasks` and `task_seconds` for metrics.jsonl; empty without questions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """What a room builds its loss from: a run that was validated and loaded.

    The attributes are those of `prepare_training`, plus references to the trainable parameters.
    """

    config: FineTuneConfig
    run: RunDirectory
    model: nn.Module
    parameters: ParameterRefs
    splits: Mapping[str, TokenizedSplit]
    world: World


@dataclass(frozen=True)
class TrainingLoss:
    """What a run with a room's `training.loss` trains with."""

    make: Callable[[LossInputs], Loss]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSetup:
    """Everything that a run trains with, passed as a whole to the trainer and its parts.

    Attributes:
        config: the resolved configuration.
        run: the run directory, which already has `initial/` and `tiers.json`.
        input_digests: digests of the inputs of training; checkpoints carry them to the gate.
        callback: receives reports and evaluations, as in mlx-lm.
        model: the base model with the initial adapter attached.
        parameters: references to its trainable parameters.
        tiers: the tier of each parameter.
        optimizer: an optimizer initialised with the parameters.
        step_schedule: what a run trains on, and when it is evaluated.
        loss_fn: the loss, in its form for this model.
        samples: prompts that are answered at each evaluation.
        questions: those of `training.evaluate_tasks`; None if no questions are asked.
        prompts: token ids of prompts on which every checkpoint records the model's logits.
        world: the ranks that train together.
    """

    # The run
    config: FineTuneConfig
    run: RunDirectory
    input_digests: Mapping[str, str]
    callback: TrainingCallback | None = None

    # The model and how it is updated
    model: nn.Module
    parameters: ParameterRefs
    tiers: TierMap
    optimizer: Tiered

    # The data and the loss
    step_schedule: StepSchedule
    loss_fn: Loss
    prompts: Prompts
    samples: SamplePrompts
    questions: Questions | None = None

    # The processes
    world: World = SINGLE_PROCESS_WORLD


def prepare_training(
    config: FineTuneConfig,
    run: RunDirectory,
    model: nn.Module,
    splits: Mapping[str, TokenizedSplit],
    *,
    tokenizer: Tokenizer,
    callback: TrainingCallback | None = None,
    make_questions: Callable[[int], Questions] | None = None,
    world: World = SINGLE_PROCESS_WORLD,
) -> TrainingSetup:
    """Build everything that a trainer needs: schedule, optimizer, loss and parameters.

    The run was validated before, and its initial adapter and tiers were written.

    Args:
        config: the resolved configuration; its memory limit is set for this process.
        run: its run directory.
        model: the base model with the initial adapter attached.
        splits: the tokenised data; "train" is needed, "valid" is used if present.
        tokenizer: the model's tokenizer, for the prompts of `samples`.
        callback: an implementation of mlx-lm's callback protocol.
        make_questions: returns the questions for a number of optimizer steps; None asks none.
        world: the ranks that train together.

    Raises ConfigError if a tier would never be due.
    """
    if config.training.memory_limit_gb is not None:
        mx.set_memory_limit(int(config.training.memory_limit_gb * 1e9))
    tiers = read_tiers(run.tiers)
    # The run's examples are mixed with replayed ones of earlier runs, if there are any
    earlier, replayed = find_earlier_examples(config, run), splits.get(REPLAY_SPLIT)
    mixed = earlier.mix(splits["train"], replayed) if earlier and replayed else None
    step_schedule = make_step_schedule(config, splits, world, mixed)
    refuse_tiers_never_due(tiers.frequencies, step_schedule.steps)
    # A run that continues a champion may train at a share of the configured learning rate.
    start = read_start(config, run)
    share = 1.0 if start is None else start.rate_share
    optimizer = build_optimizer(config, tiers, step_schedule.steps, rate_share=share)
    optimizer.init(model.trainable_parameters())
    dtype = adapter_compute_dtype(config, model)
    # Float32 copies of the weights are trained beside the model's own dtype
    masters = config.fine_tune_type == "full" and config.training.reference is None
    parameters = reference_trainable_parameters(model, masters=masters, dtype=dtype)
    if config.training.loss is None:  # cross-entropy; other losses are modules of their own
        loss_fn = step_schedule.loss.for_model(model, parameters)
    else:
        inputs = LossInputs(
            config=config, run=run, model=model, parameters=parameters, splits=splits, world=world
        )
        loss_fn = seams.load_for_loss(config.training.loss, TrainingLoss).make(inputs)
    return TrainingSetup(
        config=config,
        run=run,
        input_digests=compute_input_digests(config, run),
        callback=callback,
        model=model,
        parameters=parameters,
        tiers=tiers,
        optimizer=optimizer,
        step_schedule=step_schedule,
        loss_fn=loss_fn.for_position_counts(step_schedule.position_counts()),
        prompts=choose_prompts(splits),
        questions=None if make_questions is None else make_questions(step_schedule.steps),
        samples=SamplePrompts.from_config(config, run, tokenizer),
        world=world,
    )


def compute_input_digests(config: FineTuneConfig, run: RunDirectory) -> dict[str, str]:
    """Return digests of the inputs of training: initial adapter, tiers, base, data, tokenizer.

    If the run has them, also of replay.json (replayed examples) and start.json (the champion it
    follows).
    """
    optional = {"replay": run.replay, "start": run.start}
    digests = {name: regular_sha256(path) for name, path in optional.items() if path.is_file()}
    dataset = read_dataset_record(run.dataset)
    return digests | {
        "initial": read_adapter(run.initial).digest(),
        "initial_files": files_sha256(run.initial),
        "tiers": regular_sha256(run.tiers),
        "base": fingerprint_base_model(find_model_folder(config.model)),
        "data": dataset.digest,
        "tokenizer": str(dataset.tokenizer),
    }


def build_optimizer(
    config: FineTuneConfig, tiers: TierMap, steps: int, *, rate_share: float = 1.0
) -> Tiered:
    """Return the configured optimizer of mlx.optimizers, updating each tier at its own frequency.

    Args:
        config: names the optimizer, its arguments and the learning rate schedule.
        tiers: the names of each tier's parameters, and its frequency: how many steps apart its
            updates are.
        steps: the optimizer steps of the run, for the learning rate schedule.
        rate_share: the factor on the configured learning rates.

    Raises ConfigError if its arguments or its schedule are unusable.
    """
    section = config.nested
    scales = section.learning_rate_scale or (1.0,) * len(tiers.frequencies)
    decays = section.weight_decay or (None,) * len(tiers.frequencies)
    tier_options = [
        Tier(frequency, tiers.names(i), scales[i], decays[i])
        for i, frequency in enumerate(tiers.frequencies)
    ]
    try:
        make_optimizer = partial(
            optimizer_classes()[config.optimizer],
            build_learning_rate(config, steps, rate_share),
            **config.optimizer_arguments,
        )
        sample = {"w": mx.ones((2, 2))}
        make_optimizer().apply_gradients(sample, sample)  # some bad arguments only fail at a step
        return Tiered(
            make_optimizer,
            tier_options,
            slow_gradients=section.slow_gradients,
            accumulate=section.accumulate,
            max_grad_norm=config.training.max_grad_norm,
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"optimizer_config or lr_schedule: {error}") from error
