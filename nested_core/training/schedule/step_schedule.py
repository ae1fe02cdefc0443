"""What each step trains on, and when evaluations, reports and checkpoints are due.

A schedule depends only on the configuration, the data and the position in the run, so a checkpoint
stores nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import mlx.core as mx
import numpy as np

from nested_core import seams
from nested_core.config.schema import FineTuneConfig, Intervals
from nested_core.data.batches import (
    BatchOrder,
    BatchRows,
    ExampleRows,
    choose_evaluation_batches,
    make_batch_arrays,
)
from nested_core.data.earlier_examples import MixedExamples
from nested_core.data.tokens.tokenized_split import Int32, Int64, TokenizedSplit
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from nested_core.training.loss.loss_interface import BatchShape, Loss, MicroBatch
from nested_core.training.world import SINGLE_PROCESS_WORLD, World

MAX_WIDEST_ROWS_EXAMINED = 256
REFERENCE_KEY = "training.reference"


class StepSchedule(Protocol):
    """What a run trains on and when it is evaluated.

    An iteration is one micro-batch, counted from 0; a step is one update of the optimizer, over the
    micro-batches [first, last).

    Attributes:
        loss: the loss to train with.
        iterations: micro-batches of the whole run.
        steps: optimizer steps of the whole run.
        intervals: iterations between two reports, evaluations and checkpoints.
        epochs: the number of passes over the training data, which may be a fraction.
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
        """Return the shape of the micro-batches that take most memory."""

    def position_counts(self) -> Mapping[int, int]:
        """Return how many positions' logits to compute for each width of a batch; empty: all."""

    def micro_batch(self, index: int) -> MicroBatch:
        """Return the micro-batch of an iteration."""

    def count_replayed_tokens(self, iterations: int) -> int | None:
        """Count the replayed examples' supervised tokens so far; None without replay."""

    def validation_batches(self, iteration: int) -> Iterable[MicroBatch] | None:
        """Return the batches of an evaluation after `iteration` iterations; None without data."""

    def validation_targets(self) -> tuple[Int32, Int64] | None:
        """Return the line and the number of target tokens of each example of an evaluation.

        In the order of the rows of `validation_batches`. The number is 1 for a loss that counts
        examples. None if evaluations read different examples.
        """

    def seed_step(self, step: int) -> None:
        """Seed the random state for an optimizer step."""

    def is_complete_step(self, first: int, last: int) -> bool:
        """Whether the gradients of the micro-batches [first, last) are applied."""


class BucketedSchedule:
    """Batches of examples of similar length, each example once an epoch, with a partial last batch.

    Evaluations follow the step at which they are due, and always read the same batches. All ranks
    draw the same batches, and each takes its rows of them.
    """

    loss = SUPERVISED_LOSS

    def __init__(
        self,
        config: FineTuneConfig,
        splits: Mapping[str, TokenizedSplit],
        world: World = SINGLE_PROCESS_WORLD,
        mixed: MixedExamples | None = None,
    ) -> None:
        """Plan which examples each micro-batch has, how many there are, and when to evaluate.

        An iteration is one micro-batch; `grad_accumulation_steps` of them make an optimizer step.

        splits: the tokenised data; "valid" may be missing.
        world: the processes that train together, each on its rows of a batch.
        mixed: the run's examples together with replayed ones of earlier runs; None without replay.
        """
        self._config = config
        self.offers_best = config.training.offer == "best"
        self._world = world
        self._mixed = mixed
        self._own = len(splits["train"])
        self._train: ExampleRows = splits["train"] if mixed is None else mixed.rows
        self._valid = splits.get("valid")
        self._plan = make_batch_order(config, splits["train"]) if mixed is None else mixed.plan
        self.iterations = config.iters
        if mixed is not None:
            self.iterations = mixed.iterations
        elif config.training.epochs is not None:
            self.iterations = self._plan.count_batches(config.training.epochs)
        self.steps = math.ceil(self.iterations / config.grad_accumulation_steps)
        self.epochs = self._plan.count_epochs(self.iterations)
        # Every evaluation has the same batches; none without data, and with `val_batches: 0`
        self._evaluation_batches: list[BatchRows] = []
        if self._valid is not None:
            limit = config.max_seq_length
            self._evaluation_batches = choose_evaluation_batches(
                self._valid, config.batch_size, config.val_batches, max_seq_length=limit
            )
        self.validation_examples = sum(len(batch.rows) for batch in self._evaluation_batches)
        self.intervals = config.intervals(self.iterations, max(1, len(self._evaluation_batches)))

    def largest_batch(self) -> BatchShape:
        """Return this rank's share of the widest batch, with the most supervised tokens possible.

        If many rows are as wide, only a sample of the longest is examined.
        """
        batch_size = self._config.batch_size
        rows, width = self._plan.find_widest(max(MAX_WIDEST_ROWS_EXAMINED, batch_size))
        supervised = sorted(int(self._train.example_mask(row).sum()) for row in rows)
        self._train.release_pages()
        return BatchShape(
            batch_size // self._world.size, width, sum(supervised[-batch_size:]) // self._world.size
        )

    def position_counts(self) -> Mapping[int, int]:
        """Return for each width the most supervised positions of this rank in the first epoch.

        Other epochs mix the rows of a width anew. A batch with more positions is rare, and still
        correct: it only costs another compilation.
        """
        return self._plan.largest_sums(self._supervised, self._world.rank, self._world.size)

    @cached_property
    def _supervised(self) -> Int64:
        """The number of tokens of each example that count in the loss."""
        return self._train.count_supervised()

    def micro_batch(self, index: int) -> MicroBatch:
        """Return this rank's rows of the batch of an iteration."""
        return self._make_own_arrays(self._train, self._plan.batch(index))

    def _make_own_arrays(self, split: ExampleRows, batch: BatchRows) -> MicroBatch:
        """Build the arrays of this rank's rows of a batch."""
        own_size = self._config.batch_size // self._world.size
        return make_batch_arrays(split, self._world.own_rows(batch), own_size)

    def count_replayed_tokens(self, iterations: int) -> int | None:
        """Count the replayed examples' supervised tokens so far; None without replay."""
        return None if self._mixed is None else int(self._replayed_tokens[iterations])

    @cached_property
    def _replayed_tokens(self) -> Int64:
        """The replayed examples' supervised tokens before each iteration, and of all."""
        drawn = (self._plan.batch(index).rows for index in range(self.iterations))
        return np.cumsum([0, *(self._supervised[rows[rows >= self._own]].sum() for rows in drawn)])

    def validation_batches(self, iteration: int) -> Iterable[MicroBatch] | None:
        """Return `val_batches` batches of the validation set, always the same; None without any."""
        if (valid := self._valid) is None or not self._evaluation_batches:
            return None
        return (self._make_own_arrays(valid, batch) for batch in self._evaluation_batches)

    def validation_targets(self) -> tuple[Int32, Int64] | None:
        """Return digest and target tokens of each example in `val_batches`, longest examples first.

        None without a validation set.
        """
        if (valid := self._valid) is None or not self._evaluation_batches:
            return None
        rows = np.concatenate([batch.rows for batch in self._evaluation_batches])
        by_example = self._config.training.loss is not None  # the loss of a room counts examples
        tokens = [1 if by_example else int(valid.example_mask(row)[1:].sum()) for row in rows]
        valid.release_pages()
        return valid.contents[rows], np.array(tokens, np.int64)

    def seed_step(self, step: int) -> None:
        """Seed from the run's seed and the step, so that a resumed run has nothing to restore."""
        mx.random.seed(self._world.seed_of_step(self._config.seed, step))

    def is_complete_step(self, first: int, last: int) -> bool:
        """Whether gradients are applied: always, even for fewer micro-batches at the end."""
        return True


def make_batch_order(config: FineTuneConfig, split: TokenizedSplit) -> BatchOrder:
    """Return the order of batches that a configuration trains on, epoch after epoch."""
    return BatchOrder(
        split.lengths, config.batch_size, config.seed, max_seq_length=config.max_seq_length
    )


@dataclass(frozen=True)
class ReferenceSchedule:
    """What a run under `training.reference` trains on, of its configuration and splits."""

    make: Callable[[FineTuneConfig, Mapping[str, TokenizedSplit]], StepSchedule]


def make_step_schedule(
    config: FineTuneConfig,
    splits: Mapping[str, TokenizedSplit],
    world: World = SINGLE_PROCESS_WORLD,
    mixed: MixedExamples | None = None,
) -> StepSchedule:
    """Return the length-bucketed schedule, or under `training.reference` that of a room.

    `mixed` has the run's examples together with replayed ones. Raises ConfigError if the room is
    not installed.
    """
    if config.training.reference is None:
        return BucketedSchedule(config, splits, world, mixed)
    return seams.load_only(ReferenceSchedule, REFERENCE_KEY).make(config, splits)
