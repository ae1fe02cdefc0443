"""The supervised loss in chunks of the supervised positions: a batch's logits never exist at once.

Each chunk's gradient with respect to the body's output is computed together with its loss, so that
its logits can be freed before the next chunk's exist. The output layer itself is not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core.kernels.exponential import exponential
from nested_core.kernels.quantized_linear import sharing_dequantized_weights
from nested_core.optim.gradients import Flat
from nested_core.training.loss.logit_budget import positions_at_once, positions_without_gradient
from nested_core.training.loss.loss_interface import (
    Arrays,
    EvaluateBatch,
    Loss,
    MicroBatch,
    OutputHead,
    widen_for_device,
)

MIN_COMPUTED_POSITIONS = 64
SHARE_COMPUTED_AS_ALL = 0.9  # of the positions: so many are no fewer than all


def make_chunked_cross_entropy(head: OutputHead, chunk_rows: int | None = None) -> Loss:
    """The form of `supervised_loss` for a model with this output head.

    `chunk_rows` is the number of positions in one chunk of a training step; None: what
    `positions_at_once` allows.
    """
    loss = ChunkedCrossEntropy(head, chunk_rows)
    return Loss(
        loss.differentiable_loss,
        prepare_batch=widen_and_find_supervised_positions,
        compile_chunked_evaluation=loss.compile_evaluation,
    )


def widen_and_find_supervised_positions(
    batch: MicroBatch, position_counts: Mapping[int, int] | None = None
) -> Arrays:
    """`find_supervised_positions` of a batch as wide as the device likes it."""
    return find_supervised_positions(widen_for_device(batch), position_counts)


def find_supervised_positions(
    batch: MicroBatch, position_counts: Mapping[int, int] | None = None
) -> Arrays:
    """Tokens, and the supervised positions of the flattened batch as int32, padded with -1.

    `position_counts` are numbers of positions by the width of a batch: one for each width, so that
    there is one trace of it; nearly all are all, so that no epoch has more. A batch of another
    width, or with more supervised positions, has `round_up_position_count` of them.
    """
    tokens, target_mask = batch
    flat_mask = target_mask.reshape(-1)
    positions = np.flatnonzero(flat_mask)
    count = min((position_counts or {}).get(target_mask.shape[1], 0), flat_mask.size)
    if count < len(positions) or count < MIN_COMPUTED_POSITIONS:
        count = round_up_position_count(len(positions), flat_mask.size)
    if count > SHARE_COMPUTED_AS_ALL * flat_mask.size:
        count = flat_mask.size
    if count == flat_mask.size:
        rows = np.where(flat_mask, np.arange(flat_mask.size), -1)
    else:
        rows = np.full(count, -1)
        rows[: len(positions)] = positions
    return mx.array(tokens), mx.array(rows.astype(np.int32))


def round_up_position_count(supervised: int, size: int) -> int:
    """How many of `size` positions are computed for so many supervised.

    All, or half of them, or a quarter and so on: a trace more has to save half of the logits.
    """
    count = size
    while (half := -(-count // 2)) >= max(supervised, MIN_COMPUTED_POSITIONS):
        count = half
    return count


@dataclass(frozen=True, eq=False)
class ChunkedCrossEntropy:
    """The sum of the cross-entropy over given positions, and their number.

    `rows` are positions in the flattened batch; -1 is padding.
    """

    head: OutputHead
    chunk_rows: int | None

    def compile_evaluation(self, assign: Callable[[Flat], None]) -> EvaluateBatch:
        """The loss alone, with the logits of one chunk in memory at a time.

        It is the same to the bit as `differentiable_loss` where the output layer gives a position
        the same logits in a chunk of any size, as on a CPU.
        """

        def find_states(values: Flat, tokens: mx.array, rows: mx.array) -> Arrays:
            assign(values)
            hidden, targets = self._flatten_batch(tokens)
            return gather_rows(hidden, rows), gather_rows(targets, rows)

        def compute_losses(hidden: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
            """The loss of each position, float32 (positions,), 0 where the mask is false."""
            size = positions_without_gradient(self._count_words(hidden))
            chunks = chain_chunks(
                [hidden],
                size,
                lambda parts, at: self._compute_chunk(parts[0], targets[at], mask[at])[:1],
            )
            return mx.concatenate([losses for (losses,) in chunks])

        compiled_states = mx.compile(find_states)
        compiled_losses = mx.compile(compute_losses)

        def evaluate(
            values: Flat, tokens: mx.array, rows: mx.array
        ) -> tuple[mx.array, mx.array, mx.array]:
            hidden, targets = compiled_states(values, tokens, rows)
            mask, size = rows >= 0, self._rows_of_chunk(hidden)
            losses = []
            for start in range(0, rows.size, size):
                chunk = slice(start, start + size)
                losses.append(compiled_losses(hidden[chunk], targets[chunk], mask[chunk]))
                mx.eval(losses[-1])  # or many chunks' logits would exist at once
            batch, width = tokens.shape
            row_of_position = mx.repeat(mx.arange(batch), width - 1)
            row = row_of_position[mx.maximum(rows, 0)]  # padding adds 0 to the first
            by_row = mx.zeros((batch,)).at[row].add(mx.concatenate(losses))
            return _sum_in_order(losses), mask.sum(), by_row

        return evaluate

    def differentiable_loss(self, model: nn.Module, tokens: mx.array, rows: mx.array) -> Arrays:
        """The loss, differentiable with respect to whatever the body's output depends on."""
        hidden, targets = self._flatten_batch(tokens)

        @mx.custom_function
        def loss(hidden: mx.array) -> Arrays:
            chosen, mask = gather_rows(hidden, rows), rows >= 0
            return self._sum_chunks(chosen, gather_rows(targets, rows), mask)

        @loss.vjp
        def _(hidden: mx.array, cotangents: Arrays, outputs: Arrays) -> mx.array:
            gradient = outputs[1] * cotangents[0].astype(outputs[1].dtype)
            return _scatter_rows(gradient, rows, hidden.shape[0])

        summed: Any = loss(hidden)
        return summed[0], (rows >= 0).sum()

    def position_losses(self, tokens: mx.array, rows: mx.array) -> mx.array:
        """The loss of each of these positions, float32 (rows,), 0 for padding.

        Differentiable as `differentiable_loss` is, for a loss that weighs positions otherwise.
        """
        hidden, targets = self._flatten_batch(tokens)

        @mx.custom_function
        def losses(hidden: mx.array) -> Arrays:
            """The losses, and the gradients that `vjp` takes."""
            chosen, mask = gather_rows(hidden, rows), rows >= 0
            wanted = gather_rows(targets, rows)
            chunks = chain_chunks(
                [chosen],
                self._rows_of_chunk(chosen),
                lambda parts, at: self._compute_chunk(parts[0], wanted[at], mask[at]),
            )
            gradients = mx.concatenate([gradient for _, gradient in chunks])
            return mx.concatenate([values for values, _ in chunks]), gradients

        @losses.vjp
        def _(hidden: mx.array, cotangents: Arrays, outputs: Arrays) -> mx.array:
            gradient = outputs[1] * cotangents[0][:, None].astype(outputs[1].dtype)
            return _scatter_rows(gradient, rows, hidden.shape[0])

        of_positions: Any = losses(hidden)
        values: mx.array = of_positions[0]
        return values

    def _flatten_batch(self, tokens: mx.array) -> Arrays:
        """The body's output (positions, width), and the target token of each position."""
        hidden = self.head.hidden(tokens[:, :-1])
        return hidden.reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)

    def _count_words(self, hidden: mx.array) -> int:
        """How many logits a position has."""
        return self.head.logits(hidden[:1]).shape[-1]

    def _rows_of_chunk(self, hidden: mx.array) -> int:
        return self.chunk_rows or positions_at_once(self._count_words(hidden))

    def _sum_chunks(self, hidden: mx.array, targets: mx.array, mask: mx.array) -> Arrays:
        """The summed loss and its gradient (rows, width)."""
        chunks = chain_chunks(
            [hidden],
            self._rows_of_chunk(hidden),
            lambda parts, at: self._compute_chunk(parts[0], targets[at], mask[at]),
        )
        gradients = [gradient for _, gradient in chunks]
        return _sum_in_order([losses for losses, _ in chunks]), mx.concatenate(gradients)

    def _compute_chunk(self, hidden: mx.array, targets: mx.array, mask: mx.array) -> Arrays:
        """Losses (rows,) and gradient (rows, width) of a chunk; MLX computes only what is used."""
        given = self.head.logits(hidden)
        logits = given.astype(mx.float32)
        largest = logits.max(axis=-1, keepdims=True)
        powers = exponential(logits - largest)  # one exponential serves the loss and the gradient
        total = powers.sum(axis=-1, keepdims=True)
        picked = mx.take_along_axis(logits, targets[:, None], axis=-1)
        # a padded position may have an infinite loss, of which a product with 0 makes no number
        losses = mx.where(mask, (mx.log(total) + (largest - picked))[:, 0], 0)
        is_target = mx.arange(logits.shape[-1])[None] == targets[:, None]
        slope = ((powers / total - is_target) * mask[:, None]).astype(given.dtype)
        _, (gradient,) = mx.vjp(self.head.logits, [hidden], [slope])
        return losses, gradient


def chain_chunks(
    states: Sequence[mx.array],
    size: int,
    compute: Callable[[Sequence[mx.array], slice], tuple[mx.array, ...]],
) -> list[tuple[mx.array, ...]]:
    """What `compute` makes of each chunk of rows, where one chunk awaits the results before it.

    Args:
        states: arrays with as many rows each, of which the logits are made.
        size: the rows of a chunk.
        compute: gets the chunk's rows of each of `states`, and the slice that they are.
    """
    results: list[tuple[mx.array, ...]] = []
    with sharing_dequantized_weights(states[0]):
        for start in range(0, states[0].shape[0], size):
            chunk = slice(start, start + size)
            parts = [rows[chunk] for rows in states]
            if results:
                parts = mx.depends(parts, list(results[-1]))
            results.append(compute(parts, chunk))
    return results


def _sum_in_order(losses: list[mx.array]) -> mx.array:
    """The sum over chunks, one after the other."""
    total = mx.array(0.0)
    for loss in losses:
        total = total + loss.sum()
    return total


def gather_rows(values: mx.array, rows: mx.array) -> mx.array:
    """values[rows]; padding (-1) gathers row 0 and is masked later.

    If every row is selected the values are returned as they are.
    """
    return values if rows.size == values.shape[0] else values[mx.maximum(rows, 0)]


def _scatter_rows(gradient: mx.array, rows: mx.array, count: int) -> mx.array:
    """The gradient of `gather_rows` with respect to its `count` values.

    It is a lookup for each value, not a sum: no row is selected twice.
    """
    if rows.size == count:
        return gradient
    # In an array of its own: a number would be part of a kernel, which each width would compile.
    behind_all = mx.full((1,), count, mx.int32)
    places = mx.where(rows < 0, behind_all, rows)
    source = mx.put_along_axis(
        mx.full((count + 1,), rows.size, mx.int32), places, mx.arange(rows.size, dtype=mx.int32), 0
    )
    none = mx.zeros((1, gradient.shape[-1]), gradient.dtype)
    return mx.concatenate([gradient, none])[source[:count]]
