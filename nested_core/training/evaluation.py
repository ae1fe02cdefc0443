"""The mean loss over a fixed list of batches, for whatever adapter tensors are given."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from nested_core.config import FineTuneConfig
from nested_core.data.batches import BatchPlan, batch_arrays, evaluation_batches
from nested_core.data.tokens import TokenizedSplit
from nested_core.model import Slots
from nested_core.scalars import to_float
from nested_core.training.losses import supervised_loss
from nested_core.training.step import Flat, borrowed, put


class Evaluator:
    """Evaluates adapter tensors on the same batches, in the same order, every time.

    Args:
        model: the model that `slots` are in; it is borrowed.
        split: the tokenised examples.
        batch_size: rows a batch.
        max_batches: how many batches, chosen evenly over the lengths; -1 is all.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        split: TokenizedSplit,
        batch_size: int,
        max_batches: int = -1,
    ) -> None:
        self._model, self._slots, self._split, self._batch_size = model, slots, split, batch_size
        self._batches = evaluation_batches(split, batch_size, max_batches)
        self._compiled = mx.compile(self._sums)

    def loss(self, params: Flat) -> float:
        """Mean cross-entropy a supervised token, in nats, with dropout off."""
        was_training = self._model.training
        self._model.eval()
        total, count = mx.array(0.0), mx.array(0)
        with borrowed(self._slots):
            for batch in self._batches:
                tokens, bounds = batch_arrays(self._split, batch, self._batch_size)
                loss, supervised = self._compiled(params, mx.array(tokens), mx.array(bounds))
                total, count = total + loss, count + supervised
                mx.eval(total, count)
        self._model.train(was_training)
        return to_float(total / count)

    def _sums(self, params: Flat, tokens: mx.array, bounds: mx.array) -> tuple[mx.array, mx.array]:
        put(self._slots, params)
        return supervised_loss(self._model, tokens, bounds)


def plan_batches(config: FineTuneConfig, split: TokenizedSplit) -> BatchPlan:
    """The batches that a configuration trains on, epoch after epoch."""
    return BatchPlan(
        split.lengths, config.batch_size, config.seed, max_seq_length=config.max_seq_length
    )


def make_evaluator(
    config: FineTuneConfig, model: nn.Module, slots: Slots, valid: TokenizedSplit | None
) -> Evaluator | None:
    """An evaluator of `val_batches` validation batches, or None where there is nothing to use."""
    if valid is None or len(valid) == 0 or config.val_batches == 0:
        return None
    return Evaluator(model, slots, valid, config.batch_size, config.val_batches)
