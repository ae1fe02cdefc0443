"""What a loss is: a function of a micro-batch, and how micro-batches are averaged.

A loss may compute few logits at a time, through the output head that is found in a model here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core import backend
from nested_core.backend import to_float
from nested_core.data.batches import widen_to_fast_widths
from nested_core.kernels.patching import replacing_call
from nested_core.models.parameters import (
    ParameterRefs,
    assign_parameters,
    in_evaluation_mode,
    read_parameters,
    restoring_parameters,
)
from nested_core.optim.gradients import Flat

MAX_DEPTH = 3  # parts of a body's name at most: "model", "language_model.model", "model.norm"
PROBE_TOKENS = [[1, 2, 3, 4], [4, 3, 1, 2]]
PROBE_ROWS = [6, 1, 3]  # of the probe's eight positions, out of order
TOLERANCE_IN_EPSILONS = 16  # in units of the dtype's epsilon, relative to the largest logit

logger = logging.getLogger(__name__)


def extract_logits(outputs: Any) -> mx.array:
    """The logits in a model's output, which may be a tuple that starts with them."""
    logits: mx.array = outputs[0] if isinstance(outputs, tuple) else outputs
    return logits


def count_logits(model: nn.Module) -> int:
    """How many logits a model gives a position; nothing is computed."""
    return extract_logits(model(mx.zeros((1, 1), mx.int32))).shape[-1]


@dataclass(frozen=True, eq=False)
class OutputHead:
    """A model split in two: `body` computes the hidden states, the rest the logits."""

    model: nn.Module
    body: nn.Module

    def hidden(self, inputs: mx.array) -> mx.array:
        """The body's output (batch, length, width); the logits are never evaluated."""
        outputs: list[mx.array] = []
        own_call = type(self.body).__call__

        def keep_output(*args: Any, **kwargs: Any) -> mx.array:
            outputs.append(own_call(self.body, *args, **kwargs))
            return outputs[-1]

        with replacing_call(self.body, keep_output):
            self.model(inputs)
        return outputs[-1]

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits (rows, vocabulary) of any rows (rows, width) of the body's output."""
        with replacing_call(self.body, lambda *args, **kwargs: hidden[None]):
            logits = extract_logits(self.model(mx.zeros((1, hidden.shape[0]), mx.int32)))
            return logits.squeeze(0)  # [0] would copy them, and scatter their gradient


def find_output_head(model: nn.Module, parameters: ParameterRefs) -> OutputHead | None:
    """The frozen output head of a model; None, with the reason in the log, without one."""
    with in_evaluation_mode(model):
        logits, outputs = _record_module_outputs(model, mx.array(PROBE_TOKENS))
        for module, hidden in reversed(outputs):
            if hidden.shape[-1] == logits.shape[-1]:
                continue
            head = OutputHead(model, module)
            rows = hidden.reshape(-1, hidden.shape[-1])[mx.array(PROBE_ROWS)]
            expected = logits.reshape(-1, logits.shape[-1])[mx.array(PROBE_ROWS)]
            if not _computes_same_logits(head, rows, expected):
                continue
            if _has_trained_parameters(head, rows, parameters):
                logger.info("The output layer is trained: logits are computed at every position.")
                return None
            return head
    logger.info(
        "The output layer of %s could not be told apart: logits are computed at every position.",
        type(model).__module__,
    )
    return None


def _record_module_outputs(
    model: nn.Module, tokens: mx.array
) -> tuple[mx.array, list[tuple[nn.Module, mx.array]]]:
    """The model's logits, and the outputs (batch, length, width) of its outer modules, in order."""
    outputs: list[tuple[nn.Module, mx.array]] = []

    def keeping_output(module: nn.Module) -> Callable[..., Any]:
        """The module's call, which also keeps an output that has a row for each token."""
        own_call = type(module).__call__

        def call(*args: Any, **kwargs: Any) -> Any:
            output = own_call(module, *args, **kwargs)
            if isinstance(output, mx.array) and output.shape[:-1] == tokens.shape:
                outputs.append((module, output))
            return output

        return call

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name and name.count(".") < MAX_DEPTH:
                stack.enter_context(replacing_call(module, keeping_output(module)))
        logits = extract_logits(model(tokens))
    return logits, outputs


def _computes_same_logits(head: OutputHead, rows: mx.array, expected: mx.array) -> bool:
    """Whether the head gives the model's own logits for these rows alone, within rounding."""
    try:
        logits = head.logits(rows)
    except (ValueError, TypeError, IndexError, AttributeError):
        return False  # what follows this module needs more than its output
    if logits.shape != expected.shape:
        return False
    bound = (
        TOLERANCE_IN_EPSILONS
        * float(mx.finfo(expected.dtype).eps)
        * to_float(mx.abs(expected).max())
    )
    return to_float(mx.abs(logits - expected).max()) <= bound


def _has_trained_parameters(head: OutputHead, rows: mx.array, parameters: ParameterRefs) -> bool:
    """Whether the logits of given rows depend on a trainable parameter."""

    def total(values: dict[str, mx.array]) -> mx.array:
        assign_parameters(parameters, values)
        return mx.square(head.logits(rows).astype(mx.float32)).sum()

    with restoring_parameters(parameters):
        gradients = mx.grad(total)(read_parameters(parameters))
    # popped, so that each gradient can be freed once its maximum is known
    largest = [mx.abs(gradients.pop(name)).max() for name in list(gradients)]
    return to_float(mx.stack(largest).max()) > 0


MicroBatch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # tokens, target mask
Arrays = tuple[mx.array, mx.array]
PreparedBatch = tuple[mx.array, ...]
LossFunction = Callable[..., Arrays]
RowLossFunction = Callable[..., tuple[mx.array, mx.array, mx.array]]
EvaluateBatch = Callable[..., tuple[mx.array, ...]]
"""Values of the parameters and a prepared batch to the scalars (loss, number of target tokens) and,
where the loss of a row is known, the summed loss of each row (rows,)."""


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
        count_tokens: (*prepare_batch(batch)) to the number of target tokens, int32, for a loss that
            counts examples; None if `function` gives it.
        by_row: `function` with the summed loss of each row of the batch as a third value, (rows,);
            None if a row's loss is not known.
        with_output_head: makes the form of this loss that computes the logits of some positions
            only; None if the loss needs the model's whole output.
        compile_chunked_evaluation: makes the `EvaluateBatch` of a loss that has the logits of few
            positions in memory at a time; None if it has those of a whole batch.
    """

    function: LossFunction
    is_mean: bool = False
    prepare_batch: Callable[..., PreparedBatch] = as_arrays
    count_tokens: Callable[..., mx.array] | None = None
    by_row: RowLossFunction | None = None
    with_output_head: Callable[[OutputHead], Loss] | None = None
    compile_chunked_evaluation: Callable[[Callable[[Flat], None]], EvaluateBatch] | None = None

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
    def is_chunked(self) -> bool:
        """Whether few logits exist at a time; the memory forecast counts on it."""
        return self.compile_chunked_evaluation is not None

    def compile_evaluation(self, model: nn.Module, assign: Callable[[Flat], None]) -> EvaluateBatch:
        """What evaluates a batch with given parameters, which `assign` puts into the model."""
        if self.compile_chunked_evaluation is not None:
            return self.compile_chunked_evaluation(assign)

        def evaluate(values: Flat, *arrays: mx.array) -> tuple[mx.array, ...]:
            assign(values)
            return (self.by_row or self.function)(model, *arrays)

        return mx.compile(evaluate)

    def weight_of_micro_batch(self, tokens: mx.array) -> mx.array:
        """The weight in its step of a micro-batch with this many target tokens, int32."""
        return mx.ones_like(tokens) if self.is_mean else tokens

    def sum_over_target_tokens(self, loss: mx.array, tokens: mx.array) -> mx.array:
        """A value of this loss as a sum over its target tokens."""
        return loss * tokens if self.is_mean else loss
