"""What each step trains on and when it is evaluated.

A schedule follows from the configuration, the data and the position alone: a checkpoint keeps
nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Protocol

import mlx.core as mx
import numpy as np

from nested_core import seams
from nested_core.config.schema import FineTuneConfig, Intervals
from nested_core.data.batches import (
    BatchOrder,
    BatchPlan,
    ExampleRows,
    choose_evaluation_batches,
    make_batch_arrays,
)
from nested_core.data.earlier_examples import MixedExamples
from nested_core.data.tokens.tokenized_split import Int32, Int64, TokenizedSplit
from nested_core.training.evaluation import load_evaluation_batches
from nested_core.training.loss.loss_interface import BatchShape, Loss, MicroBatch
from nested_core.training.loss.supervised_loss import SUPERVISED_LOSS
from nested_core.training.world import SINGLE_PROCESS_WORLD, World

MAX_WIDEST_ROWS_EXAMINED = 256
REFERENCE_KEY = "training.reference"


class StepSchedule(Protocol):
    """What a run trains on and when it is evaluated.

    An iteration is one micro-batch, counted from 0; a step is one update of the optimizer, over
    the micro-batches [first, last).

    Attributes:
        loss: the loss to train with.
        iterations: micro-batches of the whole run.
        steps: optimizer steps of the whole run.
        intervals: iterations between two reports, evaluations and checkpoints.
        epochs: passes over the training data of the whole run.
        offers_best: whether the run offers its best checkpoint by validation loss, or its last.
        validation_examples: how many examples an evaluation reads.
    """

    loss: Loss
    iterations: int
    steps: int
    intervals: Intervals
    epochs: float
    offers_best: bool
    validation_examples: int

    def largest_batch(self) -> BatchShape:
        """The shape of the micro-batches that take most memory."""

    def position_counts(self) -> Mapping[int, int]:
        """How many positions' logits are computed in micro-batches of each width; empty: all."""

    def micro_batch(self, index: int) -> MicroBatch:
        """The micro-batch of an iteration."""

    def count_replayed_tokens(self, iterations: int) -> int | None:
        """Supervised tokens of replayed examples in the first so many; None without replay."""

    def validation_batches(self, iteration: int) -> Iterable[MicroBatch] | None:
        """The batches of an evaluation after so many iterations; None without an evaluation."""

    def validation_targets(self) -> tuple[Int32, Int64] | None:
        """The line and the number of target tokens of each example that an evaluation reads.

        The number is 1 for a loss that counts examples. In the order of the rows of
        `validation_batches`; None if each evaluation reads others.
        """

    def seed_step(self, step: int) -> None:
        """Prepare the random state of an optimizer step."""

    def is_complete_step(self, first: int, last: int) -> bool:
        """Whether the gradients of these micro-batches are applied."""


class BucketedSchedule:
    """Length-bucketed batches, each example once an epoch, the last partial batch included.

    Evaluations follow the step they are due at, on the same batches every time. All ranks draw the
    same batches, and each takes its own rows.
    """

    loss = SUPERVISED_LOSS

    def __init__(
        self,
        config: FineTuneConfig,
        splits: Mapping[str, TokenizedSplit],
        world: World = SINGLE_PROCESS_WORLD,
        mixed: MixedExamples | None = None,
    ) -> None:
        self._config = config
        self.offers_best = config.training.offer == "best"
        self._world = world
        self._mixed = mixed
        self._train: ExampleRows = splits["train"] if mixed is None else mixed.rows
        self._valid = splits.get("valid")
        self._plan: BatchPlan = (
            make_batch_order(config, splits["train"]) if mixed is None else mixed.plan
        )
        self.iterations = config.iters
        if mixed is not None:
            self.iterations = mixed.iterations
        elif config.training.epochs is not None:
            self.iterations = self._plan.count_batches(config.training.epochs)
        self.steps = math.ceil(self.iterations / config.grad_accumulation_steps)
        self.epochs = self._plan.count_epochs(self.iterations)
        batches = []
        if self._valid is not None:
            batches = choose_evaluation_batches(self._valid, config.batch_size, config.val_batches)
        self.validation_examples = sum(len(batch.rows) for batch in batches)
        self.intervals = config.intervals(self.iterations, max(1, len(batches)))

    def largest_batch(self) -> BatchShape:
        """This rank's share of the widest batch, with as many supervised tokens as it can have.

        If many rows are as wide as that, a sample of the longest is looked at.
        """
        batch_size = self._config.batch_size
        rows, width = self._plan.find_widest(max(MAX_WIDEST_ROWS_EXAMINED, batch_size))
        supervised = sorted(int(self._train.example_mask(row).sum()) for row in rows)
        self._train.release_pages()
        return BatchShape(
            batch_size // self._world.size, width, sum(supervised[-batch_size:]) // self._world.size
        )

    def position_counts(self) -> Mapping[int, int]:
        """For each width, the most supervised positions of this rank in the first epoch.

        Other epochs mix the rows of a width anew; batches with more are rare, and no less right.
        """
        return self._plan.largest_sums(self._supervised, self._world.rank, self._world.size)

    @cached_property
    def _supervised(self) -> Int64:
        """Tokens of each example that the loss counts."""
        return self._train.count_supervised()

    def micro_batch(self, index: int) -> MicroBatch:
        """A batch of examples of about one length."""
        batch = self._plan.batch(index)
        return self._world.own_rows(make_batch_arrays(self._train, batch, self._config.batch_size))

    def count_replayed_tokens(self, iterations: int) -> int | None:
        """A sum over the rows that were drawn so far: nothing is counted on the way."""
        if self._mixed is None:
            return None
        return self._mixed.sum_earlier(self._supervised, iterations)

    def validation_batches(self, iteration: int) -> Iterable[MicroBatch] | None:
        """`val_batches` of the validation set, the same ones every time."""
        config = self._config
        if self._valid is None or len(self._valid) == 0 or config.val_batches == 0:
            return None
        batches = load_evaluation_batches(
            self._valid,
            batch_size=config.batch_size,
            max_batches=config.val_batches,
            max_seq_length=config.max_seq_length,
        )
        return map(self._world.own_rows, batches)

    def validation_targets(self) -> tuple[Int32, Int64] | None:
        """Those of `val_batches`, longest examples first; None without a validation set."""
        config, valid = self._config, self._valid
        if valid is None or not self.validation_examples:
            return None
        batches = choose_evaluation_batches(
            valid, config.batch_size, config.val_batches, max_seq_length=config.max_seq_length
        )
        rows = np.concatenate([batch.rows for batch in batches])
        counted = config.training.loss is not None  # a room's loss counts examples
        tokens = [1 if counted else int(valid.example_mask(row)[1:].sum()) for row in rows]
        valid.release_pages()
        return valid.lines[rows], np.array(tokens, np.int64)

    def seed_step(self, step: int) -> None:
        """Seed from the run's seed and the step: on resume there is nothing to restore."""
        mx.random.seed(self._world.seed_of_step(self._config.seed, step))

    def is_complete_step(self, first: int, last: int) -> bool:
        """A partial accumulation at the end is a step too."""
        return True


def make_batch_order(config: FineTuneConfig, split: TokenizedSplit) -> BatchOrder:
    """The batches that a configuration trains on, epoch after epoch."""
    return BatchOrder(
        split.lengths, config.batch_size, config.seed, max_seq_length=config.max_seq_length
    )


def make_step_schedule(
    config: FineTuneConfig,
    splits: Mapping[str, TokenizedSplit],
    world: World = SINGLE_PROCESS_WORLD,
    mixed: MixedExamples | None = None,
) -> StepSchedule:
    """The length-bucketed schedule, or under `training.reference` that of a room.

    `mixed` has earlier examples beside those of the run. Raises ConfigError where the room of a
    reference is not installed.
    """
    if config.training.reference is None:
        return BucketedSchedule(config, splits, world, mixed)
    schedule: StepSchedule = seams.load_only("reference_schedule", REFERENCE_KEY)(config, splits)
    return schedule
