"""What a loss is: a function of a micro-batch, and how micro-batches are averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core import backend
from nested_core.data.batches import widen_to_fast_widths
from nested_core.models.parameters import ParameterRefs
from nested_core.training.loss.output_head import OutputHead, find_output_head

MicroBatch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # tokens, target mask
Arrays = tuple[mx.array, mx.array]
LossFunction = Callable[[Any, mx.array, mx.array], Arrays]
RowLossFunction = Callable[[Any, mx.array, mx.array], tuple[mx.array, mx.array, mx.array]]


@dataclass(frozen=True)
class BatchShape:
    """The rows of a batch, the tokens of a row, and the tokens in all rows that are targets."""

    rows: int
    length: int
    target_tokens: int


def as_arrays(batch: MicroBatch) -> Arrays:
    """Both parts of a micro-batch as MLX arrays."""
    tokens, target_mask = batch
    return mx.array(tokens), mx.array(target_mask)


def widen_for_device(batch: MicroBatch) -> MicroBatch:
    """The batch, padded on CUDA to a width that is computed fast; of the product's own, none is."""
    tokens, target_mask = batch
    width = np.array(target_mask.shape[1], np.int64)
    more = int(widen_to_fast_widths(width) - width) if backend.computes_on_cuda() else 0
    if not more:
        return batch
    at_the_end = ((0, 0), (0, more))
    return np.pad(tokens, at_the_end), np.pad(target_mask, at_the_end)


@dataclass(frozen=True)
class Loss:
    """A loss and its place in training; a loss module declares one.

    Attributes:
        function: (model, *prepare_batch(batch)) to the scalars (loss, number of target tokens);
            it is traced, and differentiated with respect to the model's trainable parameters.
        is_mean: whether `function` gives the mean over its target tokens, not their sum. Sums are
            divided by the target tokens of all micro-batches of a step, so that every token weighs
            the same; means are averaged, so that every micro-batch weighs the same.
        prepare_batch: a micro-batch to the arrays that `function` takes.
        evaluation_function: the same loss to the bit where no gradient is wanted; None is
            `function` itself.
        evaluation_by_row: `evaluation_function` with the summed loss of each row of the batch as a
            third value, (rows,); None where a row's loss is not known.
        with_output_head: makes the form of this loss that computes the logits of some positions
            only; None where the loss needs the model's whole output.
        is_chunked: whether few logits exist at a time; the memory forecast counts on it.
    """

    function: LossFunction
    is_mean: bool = False
    prepare_batch: Callable[..., Arrays] = as_arrays
    evaluation_function: LossFunction | None = None
    evaluation_by_row: RowLossFunction | None = None
    with_output_head: Callable[[OutputHead], Loss] | None = None
    is_chunked: bool = False

    def for_model(self, model: nn.Module, parameters: ParameterRefs) -> Loss:
        """The form of this loss for a model: through its output head alone, if it has one."""
        if self.with_output_head is None:
            return self
        head = find_output_head(model, parameters)
        return self if head is None else self.with_output_head(head)

    def for_position_counts(self, position_counts: Mapping[int, int]) -> Loss:
        """The form of this loss for batches of known widths, as `find_supervised_positions` has it.

        A loss that is not chunked computes every position, and stays as it is.
        """
        if not self.is_chunked:
            return self
        return replace(
            self, prepare_batch=partial(self.prepare_batch, position_counts=position_counts)
        )

    @property
    def evaluation_function_or_default(self) -> LossFunction:
        """The function to evaluate with."""
        return self.evaluation_function or self.function

    def weight_of_micro_batch(self, tokens: mx.array) -> mx.array:
        """The weight in its step of a micro-batch with this many target tokens, int32."""
        return mx.ones_like(tokens) if self.is_mean else tokens

    def sum_over_target_tokens(self, loss: mx.array, tokens: mx.array) -> mx.array:
        """A value of this loss as a sum over its target tokens."""
        return loss * tokens if self.is_mean else loss
