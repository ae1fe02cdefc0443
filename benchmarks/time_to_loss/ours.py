"""Our train step, driven as the trainer drives it: one step in flight at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.tiers import optimizer_for
from benchmarks.time_to_loss.arms import Arm
from benchmarks.time_to_loss.corpus import PROMPT_LENGTH, WIDTH, Corpus, training_order
from nested_core.kernels.optimized_model import using_optimized_layers
from nested_core.models.parameters import ParameterRefs, reference_trainable_parameters
from nested_core.optim.tier_assignment import TierMap, assign_tiers
from nested_core.optim.tier_counters import COUNTERS_KEY
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from nested_core.training.loss.loss_interface import MicroBatch
from nested_core.training.nonfinite_watch import NonfiniteStepWatch
from nested_core.training.train_step import TrainStep

Look = Callable[[float, Mapping[str, mx.array]], None]
THIRDS = Arm((1, 2, 4))
NEVER = 10**9  # steps in a row without a finite gradient before a run is given up


def train_ours(
    model: Any, arm: Arm, *, seed: int, rate: float, steps: int, batch: int, window: int, look: Look
) -> None:
    """Train; after every window `look` is given its seconds and the LoRA.

    The clock runs from the first batch of a window until the device has done its last step.
    """
    if arm.frozen:
        freeze_slow(model, arm)
    computed_in = mx.bfloat16 if model.model.norm.weight.dtype == mx.bfloat16 else None
    refs = reference_trainable_parameters(model, dtype=computed_in)
    tiers = tiers_of(refs, arm)
    optimizer = optimizer_for(tiers, refs, rate, arm.learning_rate_scale, arm.slow_gradients)
    batches = training_batches(seed, batch)
    model.train()
    with using_optimized_layers(model):
        loss_fn = SUPERVISED_LOSS.for_model(model, refs)
        train_step = TrainStep(
            model=model, parameters=refs, optimizer=optimizer, tiers=tiers, loss_fn=loss_fn
        )
        watch = NonfiniteStepWatch(NEVER, rate)
        for first in range(1, steps + 1, window):
            began = time.perf_counter()
            for step in range(first, first + window):
                train_step.run([next(batches)], train_step.needed_tiers(step))
                watch.add_step(step, optimizer.state[COUNTERS_KEY])
            watch.finish()
            mx.eval(train_step.packed.arrays())
            look(time.perf_counter() - began, train_step.packed.unpack())


def training_batches(seed: int, batch: int) -> Iterator[MicroBatch]:
    """The batches that mlx_lm draws under that seed; prompts are not learnt."""
    tables = Corpus().tables("train")
    learnt = np.zeros((batch, WIDTH - 1), np.bool_)
    learnt[:, PROMPT_LENGTH - 1 :] = True
    return ((tables[rows], learnt) for rows in training_order(seed, len(tables), batch))


def freeze_slow(model: Any, arm: Arm) -> None:
    """Leave the fast third of the layers trainable, as under tiers of three, and nothing else."""
    thirds = tiers_of(reference_trainable_parameters(model), Arm(THIRDS.frequencies, arm.fast))
    modules = dict(model.named_modules())
    for name, tier in thirds.tensors.items():
        if tier > 0:
            place, _, key = name.rpartition(".")
            modules[place].freeze(keys=[key], recurse=False)


def tiers_of(refs: ParameterRefs, arm: Arm) -> TierMap:
    """The tier of every tensor, as a configuration with these settings gives it."""
    settings: Any = arm
    return assign_tiers(refs, settings)
