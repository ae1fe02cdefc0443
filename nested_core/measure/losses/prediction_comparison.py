"""Compare what several adapters predict at the same supervised positions: losses, KL divergences.

KL(reference || candidate), in nats/token, measures how far the candidate's predictions have moved.
It predicts what a fine-tuned model forgets, which the norm of its weights does not (arXiv
2509.04259). It is computed over the whole vocabulary from the logits that the losses need anyway.
Only the logits of one chunk of positions are in memory at a time, so a large vocabulary needs no
approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core.data.tokens.tokenized_split import Int32
from nested_core.kernels.exponential import exponential
from nested_core.models.parameters import (
    ParameterRefs,
    assign_parameters,
    in_evaluation_mode,
    restoring_parameters,
)
from nested_core.optim.gradients import Flat
from nested_core.training.loss.cross_entropy import (
    OutputHead,
    chain_chunks,
    find_output_head,
    find_supervised_positions,
    gather_rows,
)
from nested_core.training.loss.logit_budget import (
    positions_at_once,
    positions_without_gradient,
    split_batch,
)
from nested_core.training.loss.loss_interface import MicroBatch, count_logits, extract_logits

Vector = np.typing.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ExamplePredictions:
    """Sums over the supervised tokens of each of n examples, in nats; float64.

    losses: of each adapter, (adapters, n).
    divergences: KL(adapter || last adapter), of each adapter but the last, (adapters - 1, n).
    tokens: the number of supervised tokens of each example, (n,).
    answer_losses, answer_tokens: of each answer of an example where the loss is computed from
        several, (adapters, answers, n) and (answers, n); None for the cross-entropy.
    """

    losses: Vector
    divergences: Vector
    tokens: Vector
    answer_losses: Vector | None = None
    answer_tokens: Vector | None = None

    @classmethod
    def of_batches(
        cls, batches: Iterable[tuple[Int32, ExamplePredictions]], examples: int
    ) -> ExamplePredictions:
        """Return the predictions of a split by those of its batches.

        Args:
            batches: the examples in the first rows of each batch, and the batch's predictions.
            examples: the number of examples in the split. One in no batch gets 0 everywhere.
        """
        columns: dict[str, Vector] = {}
        for rows, predictions in batches:
            for name, column in vars(predictions).items():
                if column is not None:
                    empty = np.zeros((*column.shape[:-1], examples))
                    columns.setdefault(name, empty)[..., rows] = column[..., : len(rows)]
        return cls(**columns)


@dataclass(frozen=True, eq=False)
class PredictionComparison:
    """A model that predicts with several values of its trainable parameters, without dropout.

    If the model has an output head that is separate and not trained, the outputs of the model's
    body are kept until all adapters' logits are compared. Otherwise the larger logits are kept, of
    fewer rows of a batch at a time.
    """

    model: nn.Module
    parameters: ParameterRefs
    head: OutputHead | None

    @classmethod
    def of_model(cls, model: nn.Module, parameters: ParameterRefs) -> PredictionComparison:
        """Build it for a model with its adapter attached; `parameters` are the trainable ones."""
        return cls(model, parameters, find_output_head(model, parameters))

    @cached_property
    def _compiled_hidden_states(self) -> Callable[..., mx.array]:
        """`_hidden_states`, compiled by MLX at first use."""
        return mx.compile(self._hidden_states)

    @cached_property
    def _compiled_comparison(self) -> Callable[..., tuple[mx.array, mx.array]]:
        """`_compare_group`, compiled by MLX at first use."""
        return mx.compile(self._compare_group)

    def compare(self, values: Sequence[Flat], batch: MicroBatch) -> ExamplePredictions:
        """Return losses with each of `values`, and each one's divergence to the last of them.

        The last has no divergence to itself.
        """
        if self.head is not None:
            return self._compare(values, batch)
        split = split_batch(batch, count_logits(self.model), len(values))
        parts = [self._compare(values, part) for part in split]
        return ExamplePredictions(
            losses=np.concatenate([part.losses for part in parts], axis=1),
            divergences=np.concatenate([part.divergences for part in parts], axis=1),
            tokens=np.concatenate([part.tokens for part in parts]),
        )

    def _compare(self, values: Sequence[Flat], batch: MicroBatch) -> ExamplePredictions:
        """Compare all adapters on one batch and sum the results over each example's positions.

        Returns losses (adapters, rows), divergences from the last adapter (adapters - 1, rows) and
        numbers of tokens (rows,); a row is an example of the batch.

        values: each adapter's parameter values.
        """
        tokens, positions = find_supervised_positions(batch)
        with in_evaluation_mode(self.model), restoring_parameters(self.parameters):
            states = []
            for parameters in values:
                states.append(self._compiled_hidden_states(parameters, tokens, positions))
                mx.eval(states[-1])  # or the activations of all passes would exist at once
            losses, divergences = self._compare_chunks(states, tokens, positions)
        rows, width = batch[1].shape
        is_target = np.array(positions) >= 0  # negative positions are padding
        row_of_target = np.array(positions)[is_target] // width

        def sum_rows(sums: Vector) -> Vector:
            """Sum the values at target positions over each row."""
            return np.bincount(row_of_target, sums[is_target], minlength=rows).astype(np.float64)

        return ExamplePredictions(
            losses=np.array([sum_rows(of_adapter) for of_adapter in losses]),
            # reshaped because a single adapter has no divergences: the shape is then (0, rows)
            divergences=np.array([sum_rows(kl) for kl in divergences]).reshape(-1, rows),
            tokens=np.bincount(row_of_target, minlength=rows).astype(np.float64),
        )

    def _hidden_states(self, values: Flat, tokens: mx.array, positions: mx.array) -> mx.array:
        """Return the states that the logits of the positions are computed from.

        These are outputs of the model's body, (positions, width), or without a separate head the
        logits, (positions, vocabulary).
        """
        assign_parameters(self.parameters, values)
        inputs = tokens[:, :-1]
        if self.head is None:
            states = extract_logits(self.model(inputs))
        else:
            states = self.head.hidden(inputs)
        return gather_rows(states.reshape(-1, states.shape[-1]), positions)

    def _logits(self, states: mx.array) -> mx.array:
        """Return the logits of hidden states; without an output head, the states are the logits."""
        return states if self.head is None else self.head.logits(states)

    def _count_words(self, states: Sequence[mx.array]) -> int:
        """Return the size of the vocabulary."""
        return self._logits(states[0][:1]).shape[-1]

    def _compare_chunks(
        self, states: Sequence[mx.array], tokens: mx.array, positions: mx.array
    ) -> tuple[Vector, Vector]:
        """Compare the positions in groups whose logits fit the logit budget.

        Returns losses (adapters, positions) and divergences (adapters - 1, positions).
        """
        targets = gather_rows(tokens[:, 1:].reshape(-1), positions)
        rows = positions_at_once(self._count_words(states), len(states))
        groups: list[tuple[Vector, Vector]] = []
        for start in range(0, targets.size, rows):
            group = slice(start, start + rows)
            group_states = [adapter_states[group] for adapter_states in states]
            figures = self._compiled_comparison(group_states, targets[group])
            mx.eval(figures)  # or the logits of many groups would exist at once
            groups.append((np.array(figures[0], np.float64), np.array(figures[1], np.float64)))
        losses, divergences = zip(*groups, strict=True)
        return np.concatenate(losses, axis=1), np.concatenate(divergences, axis=1)

    def _compare_group(
        self, states: Sequence[mx.array], targets: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Compare the positions of one group, whose logits may exist at once; float32."""
        chunks = chain_chunks(
            states,
            positions_without_gradient(self._count_words(states), len(states)),
            lambda parts, at: compare_logits([self._logits(part) for part in parts], targets[at]),
        )
        losses = mx.concatenate([chunk[0] for chunk in chunks], axis=1)
        return losses, mx.concatenate([chunk[1] for chunk in chunks], axis=1)


def compare_logits(logits: Sequence[mx.array], targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return cross-entropies, and KL divergences from each adapter to the last; in nats, float32.

    Args:
        logits: of each adapter (rows, vocabulary), of any float dtype.
        targets: the token that follows in each row, integers (rows,).

    Returns:
        Losses (adapters, rows) and KL divergences (adapters - 1, rows), the latter at least 0.
    """
    distributions = [_Distribution.of(adapter_logits) for adapter_logits in logits]
    losses = mx.stack([distribution.loss(targets) for distribution in distributions])
    if len(distributions) == 1:
        return losses, mx.zeros((0, targets.size))
    *others, last = distributions
    return losses, mx.stack([distribution.divergence_to(last) for distribution in others])


@dataclass(frozen=True, eq=False)
class _Distribution:
    """One distribution over the vocabulary for each row, as terms that loss and divergence share.

    shifted: logits minus the row's largest, float32 (rows, vocabulary).
    largest: the largest logit of each row, (rows, 1).
    powers: exp(shifted).
    total: the sum of powers of each row, (rows, 1).
    """

    shifted: mx.array
    largest: mx.array
    powers: mx.array
    total: mx.array

    @classmethod
    def of(cls, logits: mx.array) -> _Distribution:
        """Compute it from logits (rows, vocabulary) of any dtype, in float32."""
        exact = logits.astype(mx.float32)
        largest = exact.max(axis=-1, keepdims=True)
        shifted = exact - largest
        powers = exponential(shifted)
        return cls(shifted, largest, powers, powers.sum(axis=-1, keepdims=True))

    def loss(self, targets: mx.array) -> mx.array:
        """Return the cross-entropy of each row with its target token, (rows,)."""
        picked = mx.take_along_axis(self.shifted, targets[:, None], axis=-1)
        return (mx.log(self.total) - picked)[:, 0]

    def divergence_to(self, other: _Distribution) -> mx.array:
        """Return KL(self || other) of each row, (rows,), at least 0.

        It is the mean of log(p / q) under p. A token with probability 0 under self adds nothing,
        even if it is impossible under other too.
        """
        ratio = self.powers * (self.shifted - other.shifted)
        expected = mx.where(self.powers == 0, 0.0, ratio).sum(axis=-1, keepdims=True)
        divergence = expected / self.total - (mx.log(self.total) - mx.log(other.total))
        return mx.maximum(divergence, 0.0)[:, 0]
