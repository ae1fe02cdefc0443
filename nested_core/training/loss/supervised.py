"""The loss of a batch, and how batches are weighed against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

MicroBatch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # tokens; what is learnt of them
Arrays = tuple[mx.array, mx.array]
Loss = Callable[[Any, mx.array, mx.array], Arrays]


@dataclass(frozen=True)
class BatchShape:
    """The rows of a batch, the tokens of a row, and the tokens in all rows that are targets."""

    rows: int
    length: int
    target_tokens: int


def as_given(batch: MicroBatch) -> Arrays:
    """Both parts of a batch on the device."""
    return mx.array(batch[0]), mx.array(batch[1])


@dataclass(frozen=True)
class LossRule:
    """A loss, and whether it is a mean over a batch's tokens or their sum.

    Sums are divided by the tokens of all micro-batches, so that every token weighs the same however
    the batch was cut; means are averaged, so that every micro-batch weighs the same. `arrange`
    makes of a batch what the loss takes; `value` is the loss where no gradient is wanted.
    """

    function: Loss
    is_mean: bool
    arrange: Callable[[MicroBatch], Arrays] = as_given
    value_only: Loss | None = None

    @property
    def value(self) -> Loss:
        """The loss for an evaluation, the same to the bit."""
        return self.function if self.value_only is None else self.value_only

    def weight(self, tokens: mx.array) -> mx.array:
        """What a micro-batch with so many supervised tokens weighs, int32."""
        return mx.ones_like(tokens) if self.is_mean else tokens

    def weighted(self, loss: mx.array, tokens: mx.array) -> mx.array:
        """The loss as a sum over tokens."""
        return loss * tokens if self.is_mean else loss


def supervised_loss(
    model: Any, tokens: mx.array, supervised: mx.array
) -> tuple[mx.array, mx.array]:
    """Sum of the cross-entropy over supervised tokens, and their number; a pad never counts.

    Args:
        model: inputs of shape (batch, length) to logits (batch, length, vocabulary), or a tuple
            that starts with them.
        tokens: (batch, length + 1) int32; token t + 1 is predicted from tokens up to t.
        supervised: (batch, length) bool, about the targets: tokens 1, 2, ... of each row.

    Returns:
        Both as scalars: float32 sum in nats, int32 count.
    """
    logits = first_of(model(tokens[:, :-1]))
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), tokens[:, 1:])
    return (losses * supervised).sum(), supervised.sum()


def first_of(outputs: Any) -> mx.array:
    """The logits of a model that may return more than them."""
    logits: mx.array = outputs[0] if isinstance(outputs, tuple) else outputs
    return logits


SUPERVISED = LossRule(supervised_loss, is_mean=False)
