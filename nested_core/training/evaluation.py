"""The mean loss over batches, for whatever adapter tensors are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import mlx.core as mx
import mlx.nn as nn

from nested_core.data.batches import batch_arrays, evaluation_batches
from nested_core.data.tokens import TokenizedSplit
from nested_core.gradients import Flat
from nested_core.scalars import to_float
from nested_core.slots import Slots, borrowed, put
from nested_core.training.losses import SUPERVISED, LossRule, MicroBatch


class EvaluationCut(Exception):  # noqa: N818  # no error: the trainer turns it into a stop
    """A stop was asked for in the middle of an evaluation; nothing of it counts."""


class Evaluator:
    """Evaluates adapter tensors in a model that is borrowed; `slots` are their places in it.

    `is_cut` is asked before every batch; once it says so, `loss` raises EvaluationCut.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        rule: LossRule = SUPERVISED,
        is_cut: Callable[[], bool] = lambda: False,
    ) -> None:
        self._model, self._slots, self._rule, self._is_cut = model, slots, rule, is_cut
        self._compiled = mx.compile(self._sums)

    def loss(self, params: Flat, batches: Iterable[MicroBatch]) -> float:
        """Mean cross-entropy a supervised token, in nats, with dropout off."""
        was_training = self._model.training
        self._model.eval()
        total, count = mx.array(0.0), mx.array(0)
        try:
            with borrowed(self._slots):
                for batch in batches:
                    if self._is_cut():
                        raise EvaluationCut
                    loss, supervised = self._compiled(params, *self._rule.arrange(batch))
                    total = total + self._rule.weighted(loss, supervised)
                    count = count + supervised
                    mx.eval(total, count)
        finally:
            self._model.train(was_training)
        return to_float(total / count)

    def _sums(self, params: Flat, tokens: mx.array, learnt: mx.array) -> tuple[mx.array, mx.array]:
        put(self._slots, params)
        return self._rule.value(self._model, tokens, learnt)


def fixed_batches(
    split: TokenizedSplit, batch_size: int, max_batches: int, max_seq_length: int
) -> Iterable[MicroBatch]:
    """The same batches in the same order every time; -1 is all, fewer are spread over lengths."""
    chosen = evaluation_batches(split, batch_size, max_batches, max_seq_length=max_seq_length)
    return (batch_arrays(split, batch, batch_size) for batch in chosen)
