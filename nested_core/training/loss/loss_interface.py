"""What a loss is: a function of a micro-batch, and the way micro-batches are averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core.models.parameters import ParameterRefs
from nested_core.optim.gradients import Flat


def extract_logits(outputs: mx.array | tuple[mx.array, ...]) -> mx.array:
    """Return the logits of a model's output, which may be a tuple that starts with them."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def count_logits(model: nn.Module) -> int:
    """Return the number of logits that a model gives each position, without computing them."""
    return extract_logits(model(mx.zeros((1, 1), mx.int32))).shape[-1]


MicroBatch = tuple[
    np.typing.NDArray[np.int32], np.typing.NDArray[np.generic]
]  # tokens, target mask
Arrays = tuple[mx.array, mx.array]
PreparedBatch = tuple[mx.array, ...]
LossFunction = Callable[..., Arrays]
RowLossFunction = Callable[..., tuple[mx.array, mx.array, mx.array]]
EvaluateBatch = Callable[..., tuple[mx.array, ...]]
"""Maps parameter values and a prepared batch to the scalars (loss, number of target tokens) and, if
the loss of single rows is known, the summed loss of each row (rows,)."""


@dataclass(frozen=True)
class BatchShape:
    """The number of rows in a batch, tokens in a row, and target tokens in all rows together."""

    rows: int
    length: int
    target_tokens: int


def as_arrays(batch: MicroBatch) -> Arrays:
    """Convert both parts of a micro-batch to MLX arrays."""
    tokens, target_mask = batch
    return mx.array(tokens), mx.array(target_mask)


@dataclass(frozen=True)
class Loss:
    """A loss and how training uses it; a loss module declares one.

    Attributes:
        function: maps (model, *prepare_batch(batch)) to the scalars (loss, number of target
            tokens); it is traced, and differentiated with respect to the model's trainable
            parameters.
        is_mean: whether `function` returns the mean over its target tokens, not their sum. Sums are
            divided by the target tokens of all micro-batches of a step, so that every token weighs
            the same; means are averaged, so that every micro-batch weighs the same.
        prepare_batch: converts a micro-batch to the arrays that `function` takes.
        count_tokens: maps prepare_batch(batch) to the number of target tokens, int32, for a loss
            that counts examples; None if `function` returns it.
        by_row: `function` with the summed loss of each row of the batch as a third value, (rows,);
            None if the loss of single rows is not known.
        fit_to_model: returns the form of this loss for a model and its trainable parameters, such
            as one that computes the logits of some positions only; None if it has one form.
        compile_chunked_evaluation: returns the `EvaluateBatch` of a loss that keeps the logits of
            few positions in memory at a time; None if it keeps those of a whole batch.
        begin: called by every rank before a run is trained or goes on, for what takes long; who
            only asks what a run would need builds the loss without it.
        rows_to_begin: the rows that `begin` puts through the model before the first step.
    """

    function: LossFunction
    is_mean: bool = False
    prepare_batch: Callable[..., PreparedBatch] = as_arrays
    count_tokens: Callable[..., mx.array] | None = None
    by_row: RowLossFunction | None = None
    fit_to_model: Callable[[nn.Module, ParameterRefs], Loss] | None = None
    compile_chunked_evaluation: Callable[[Callable[[Flat], None]], EvaluateBatch] | None = None
    begin: Callable[[], None] = lambda: None
    rows_to_begin: int = 0

    def for_model(self, model: nn.Module, parameters: ParameterRefs) -> Loss:
        """Return the form of this loss for a model with these trainable parameters."""
        return self if self.fit_to_model is None else self.fit_to_model(model, parameters)

    def for_position_counts(self, position_counts: Mapping[int, int]) -> Loss:
        """Return the form of this loss for batches of known widths.

        See `find_supervised_positions`. A loss that is not chunked is returned unchanged.
        """
        if not self.is_chunked:
            return self
        return replace(
            self, prepare_batch=partial(self.prepare_batch, position_counts=position_counts)
        )

    @property
    def is_chunked(self) -> bool:
        """Whether few logits exist at a time; the memory forecast relies on it."""
        return self.compile_chunked_evaluation is not None

    def compile_evaluation(self, model: nn.Module, assign: Callable[[Flat], None]) -> EvaluateBatch:
        """Return a compiled function that evaluates a batch with given parameter values.

        `assign` puts the values into the model.
        """
        if self.compile_chunked_evaluation is not None:
            return self.compile_chunked_evaluation(assign)

        def evaluate(values: Flat, *arrays: mx.array) -> tuple[mx.array, ...]:
            """Compute the loss with the given parameter values."""
            assign(values)
            return (self.by_row or self.function)(model, *arrays)

        return mx.compile(evaluate)

    def weight_of_micro_batch(self, tokens: mx.array) -> mx.array:
        """Return a micro-batch's weight in its step, int32, given its number of target tokens."""
        return mx.ones_like(tokens) if self.is_mean else tokens

    def sum_over_target_tokens(self, loss: mx.array, tokens: mx.array) -> mx.array:
        """Convert a value of this loss to a sum over its target tokens."""
        return loss * tokens if self.is_mean else loss
