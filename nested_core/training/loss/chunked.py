"""The loss at supervised positions only, in chunks: the logits of a whole batch never exist.

Each chunk's gradient with respect to the body's output is computed together with its loss, so that
its logits are gone before the next chunk's are made. The output layer itself is not trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core.kernels.exponential import exponential
from nested_core.models.parameters import ParameterRefs
from nested_core.training.loss.output_head import OutputHead, find_head
from nested_core.training.loss.supervised import SUPERVISED, Arrays, LossRule, MicroBatch

LEAST_POSITIONS = 64
CHUNK_LOGITS = 2**26  # logits of one chunk: 256 MiB in float32
LEAST_CHUNK = 128


def rule_for(model: nn.Module, refs: ParameterRefs, rule: LossRule) -> LossRule:
    """Our own loss as it is cheapest to compute for this model; any other rule as it is."""
    if rule is not SUPERVISED:
        return rule
    head = find_head(model, refs)
    return rule if head is None else positions_rule(head)


def positions_rule(head: OutputHead, chunk: int | None = None) -> LossRule:
    """The rule of `supervised_loss` with an output layer that is computed apart.

    `chunk` is the rows of one chunk; None is as many as CHUNK_LOGITS allows.
    """
    loss = PositionsLoss(head, chunk)
    return LossRule(loss.with_gradient, is_mean=False, arrange=positions, value_only=loss.value)


def positions(batch: MicroBatch) -> Arrays:
    """Tokens, and the supervised positions of a batch as int32 row numbers, -1 where there is none.

    Their number is a power of two, or that of all positions: few shapes for few traces.
    """
    tokens, supervised = batch
    flat = supervised.reshape(-1)
    found = np.flatnonzero(flat)
    room = room_for(len(found), flat.size)
    if room == flat.size:
        rows = np.where(flat, np.arange(flat.size), -1)
    else:
        rows = np.full(room, -1)
        rows[: len(found)] = found
    return mx.array(tokens), mx.array(rows.astype(np.int32))


def room_for(found: int, size: int) -> int:
    """How many positions are computed where `found` of `size` are supervised."""
    return min(size, max(LEAST_POSITIONS, 1 << max(found - 1, 0).bit_length()))


def rows_at_once(vocabulary: int) -> int:
    """The rows of one chunk of logits."""
    return max(LEAST_CHUNK, 1 << (CHUNK_LOGITS // vocabulary).bit_length() - 1)


@dataclass(frozen=True, eq=False)
class PositionsLoss:
    """Sum of the cross-entropy over given positions, and their number, as `supervised_loss`."""

    head: OutputHead
    chunk: int | None

    def value(self, model: nn.Module, tokens: mx.array, rows: mx.array) -> Arrays:
        """The loss alone, the same to the bit."""
        hidden, targets = self._flat(tokens)
        total, _ = self._in_chunks(_take(hidden, rows), _take(targets, rows), rows >= 0)
        return total, (rows >= 0).sum()

    def with_gradient(self, model: nn.Module, tokens: mx.array, rows: mx.array) -> Arrays:
        """The loss, differentiable with respect to whatever the body is computed from."""
        hidden, targets = self._flat(tokens)

        @mx.custom_function
        def loss(hidden: mx.array) -> Arrays:
            chosen, learnt = _take(hidden, rows), rows >= 0
            return self._in_chunks(chosen, _take(targets, rows), learnt, wants_gradient=True)

        @loss.vjp
        def _(hidden: mx.array, cotangents: Arrays, outputs: Arrays) -> mx.array:
            gradient = outputs[1] * cotangents[0].astype(outputs[1].dtype)
            return _put_back(gradient, rows, hidden.shape[0])

        summed: Any = loss(hidden)
        return summed[0], (rows >= 0).sum()

    def _flat(self, tokens: mx.array) -> Arrays:
        """The body's output (positions, width), and the token to be predicted at each."""
        hidden = self.head.hidden(tokens[:, :-1])
        return hidden.reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)

    def _in_chunks(
        self, hidden: mx.array, targets: mx.array, learnt: mx.array, *, wants_gradient: bool = False
    ) -> Arrays:
        """The summed loss, and, where it is wanted, its gradient (rows, width)."""
        rows = self.chunk or rows_at_once(self.head.logits(hidden[:1]).shape[-1])
        total, gradients, before = mx.array(0.0), [], None
        for start in range(0, hidden.shape[0], rows):
            part = hidden[start : start + rows]
            if before is not None:
                part = mx.depends(part, before)  # one chunk's logits at a time
            place = slice(start, start + rows)
            loss, gradient = self._chunk(part, targets[place], learnt[place])
            total = total + loss
            before = gradient if wants_gradient else loss
            gradients.append(gradient)
        return total, mx.concatenate(gradients) if wants_gradient else total

    def _chunk(self, hidden: mx.array, targets: mx.array, learnt: mx.array) -> Arrays:
        """Loss and gradient of some rows; whichever is not used is not computed."""
        given = self.head.logits(hidden)
        logits = given.astype(mx.float32)
        largest = logits.max(axis=-1, keepdims=True)
        powers = exponential(logits - largest)  # one exponential serves the loss and the gradient
        total = powers.sum(axis=-1, keepdims=True)
        picked = mx.take_along_axis(logits, targets[:, None], axis=-1)
        loss = ((mx.log(total) + (largest - picked))[:, 0] * learnt).sum()
        is_target = mx.arange(logits.shape[-1])[None] == targets[:, None]
        slope = ((powers / total - is_target) * learnt[:, None]).astype(given.dtype)
        _, (gradient,) = mx.vjp(self.head.logits, [hidden], [slope])
        return loss, gradient


def _take(values: mx.array, rows: mx.array) -> mx.array:
    """The rows asked for; some row where there is none; as they are where all are asked for."""
    return values if rows.size == values.shape[0] else values[mx.maximum(rows, 0)]


def _put_back(gradient: mx.array, rows: mx.array, count: int) -> mx.array:
    """The gradient of `_take`: by a lookup for each of `count` rows, which adds nothing up."""
    if rows.size == count:
        return gradient
    places = mx.where(rows < 0, count, rows)
    source = mx.put_along_axis(
        mx.full((count + 1,), rows.size, mx.int32), places, mx.arange(rows.size, dtype=mx.int32), 0
    )
    none = mx.zeros((1, gradient.shape[-1]), gradient.dtype)
    return mx.concatenate([gradient, none])[source[:count]]
