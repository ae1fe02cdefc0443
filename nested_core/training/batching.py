"""How a run draws its batches and when it evaluates: ours here, mlx-lm's in reference.py.

A method is a function of the configuration, the data and the position: it keeps nothing that a
checkpoint would have to hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import mlx.core as mx

from nested_core.config.schema import FineTuneConfig
from nested_core.data.batches import BatchPlan
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.training.distributed import SINGLE_PROCESS, World
from nested_core.training.evaluation import fixed_batches
from nested_core.training.loss.supervised import SUPERVISED, BatchShape, LossRule, MicroBatch

SAMPLED_ROWS = 256


class Method(Protocol):
    """What the trainer asks. Iterations count micro-batches, from 0; steps optimizer steps."""

    rule: LossRule
    iterations: int
    steps: int
    offers_best: bool
    evaluates_after: bool
    draws_in_sequence: bool

    def largest_batch(self) -> BatchShape:
        """The shape of the micro-batches that take most memory."""

    def micro_batch(self, index: int) -> MicroBatch:
        """The micro-batch of an iteration."""

    def validation_batches(self, iteration: int) -> Iterable[MicroBatch] | None:
        """What an evaluation after so many iterations looks at; None is nothing to look at."""

    def begin_step(self, step: int) -> None:
        """Prepare the random state of an optimizer step."""

    def completes(self, first: int, last: int) -> bool:
        """Whether the micro-batches [first, last) are a whole optimizer step."""

    def evaluations_within(self, first: int, last: int) -> list[int]:
        """Iterations done at evaluations that come before the step [first, last) is applied."""

    def reports_within(self, first: int, last: int) -> list[int]:
        """Iterations done at reports that fall into the step [first, last)."""


class OwnMethod:
    """Length-bucketed batches, each example once an epoch; remainders are used.

    Evaluations come after the update they are due with, on the same batches every time. Ranks draw
    the same batches, and each takes its rows of every one.
    """

    rule = SUPERVISED
    offers_best = True
    evaluates_after = True
    draws_in_sequence = False

    def __init__(
        self,
        config: FineTuneConfig,
        splits: Mapping[str, TokenizedSplit],
        world: World = SINGLE_PROCESS,
    ) -> None:
        self._config, self._world = config, world
        self._train, self._valid = splits["train"], splits.get("valid")
        self._plan = plan_batches(config, self._train)
        epochs = config.training.epochs
        whole = None if epochs is None else math.ceil(epochs * self._plan.batches_per_epoch)
        self.iterations = config.iters if whole is None else whole
        self.steps = math.ceil(self.iterations / config.grad_accumulation_steps)

    def largest_batch(self) -> BatchShape:
        """This rank's share of the widest batch, as much of it learnt as its rows ask for at most.

        Of many rows that are as wide, a sample of the longest is looked at.
        """
        buckets, each = self._plan.buckets, self._config.batch_size
        rows = buckets.rows[: min(int(buckets.starts[1]), max(SAMPLED_ROWS, each))]
        learnt = sorted(int(self._train.example_mask(row).sum()) for row in rows)
        self._train.give_back()
        size = self._world.size
        return BatchShape(each // size, buckets.width_at(0), sum(learnt[-each:]) // size)

    def micro_batch(self, index: int) -> MicroBatch:
        """A batch of examples of about one length."""
        return self._world.own_rows(self._plan.arrays(self._train, index))

    def validation_batches(self, iteration: int) -> Iterable[MicroBatch] | None:
        """`val_batches` of the validation set, the same ones every time."""
        config = self._config
        if self._valid is None or len(self._valid) == 0 or config.val_batches == 0:
            return None
        sizes = config.batch_size, config.val_batches, config.max_seq_length
        return map(self._world.own_rows, fixed_batches(self._valid, *sizes))

    def begin_step(self, step: int) -> None:
        """Seed from the run's seed and the step, so that nothing is to be restored on resume."""
        mx.random.seed(self._world.seed(self._config.seed, step))

    def completes(self, first: int, last: int) -> bool:
        """A partial accumulation at the end is a step too."""
        return True

    def evaluations_within(self, first: int, last: int) -> list[int]:
        """None: they come after the step."""
        return []

    def reports_within(self, first: int, last: int) -> list[int]:
        """One, after the step that completes a multiple of `steps_per_report`."""
        every = self._config.steps_per_report
        return [last] if last // every > first // every else []


def plan_batches(config: FineTuneConfig, split: TokenizedSplit) -> BatchPlan:
    """The batches that a configuration trains on, epoch after epoch."""
    return BatchPlan(
        split.lengths, config.batch_size, config.seed, max_seq_length=config.max_seq_length
    )


def make_method(
    config: FineTuneConfig, splits: Mapping[str, TokenizedSplit], world: World = SINGLE_PROCESS
) -> Method:
    """Our way of drawing batches and evaluating, or, under `training.reference`, mlx-lm's."""
    if config.training.reference is None:
        return OwnMethod(config, splits, world)
    from nested_core.training.mlx_lm_reference import ReferenceMethod

    return ReferenceMethod(config, splits)
