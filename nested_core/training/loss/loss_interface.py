"""What a loss is: a function of a micro-batch, and the way micro-batches are averaged.

A loss may compute few logits at a time through the model's output head, which is found here.
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

MAX_DEPTH = 3  # most dotted parts in the name of a body: "model", "language_model.model"
PROBE_TOKENS = [[1, 2, 3, 4], [4, 3, 1, 2]]
PROBE_ROWS = [6, 1, 3]  # some of the probe's eight positions, out of order
TOLERANCE_IN_EPSILONS = 16  # in units of the dtype's epsilon, relative to the largest logit

logger = logging.getLogger(__name__)


def extract_logits(outputs: Any) -> mx.array:
    """Return the logits of a model's output, which may be a tuple that starts with them."""
    logits: mx.array = outputs[0] if isinstance(outputs, tuple) else outputs
    return logits


def count_logits(model: nn.Module) -> int:
    """Return the number of logits that a model gives each position, without computing them."""
    return extract_logits(model(mx.zeros((1, 1), mx.int32))).shape[-1]


@dataclass(frozen=True, eq=False)
class OutputHead:
    """A model split in two: `body` computes hidden states, and the rest computes the logits."""

    model: nn.Module
    body: nn.Module

    def hidden(self, inputs: mx.array) -> mx.array:
        """Return the body's output (batch, length, width); the logits are never evaluated."""
        outputs: list[mx.array] = []
        original_call = type(self.body).__call__

        def keep_output(*args: Any, **kwargs: Any) -> mx.array:
            """Call the model's body and keep its output."""
            outputs.append(original_call(self.body, *args, **kwargs))
            return outputs[-1]

        with replacing_call(self.body, keep_output):
            self.model(inputs)
        return outputs[-1]

    def logits(self, hidden: mx.array) -> mx.array:
        """Return logits (rows, vocabulary) for any rows (rows, width) of the body's output.

        Runs the model with the body replaced by these rows.
        """
        with replacing_call(self.body, lambda *args, **kwargs: hidden[None]):
            logits = extract_logits(self.model(mx.zeros((1, hidden.shape[0]), mx.int32)))
            return logits.squeeze(0)  # [0] would copy them, and scatter their gradient


def find_output_head(model: nn.Module, parameters: ParameterRefs) -> OutputHead | None:
    """Find the model's frozen output head; without one, log the reason and return None.

    The head is the output layer and what follows the body. With it the logits can be computed in
    chunks, or only where the loss counts. It must be frozen, and not depend on other positions.

    Tries the outputs of the model's outer modules, the last first, as input of the remaining
    layers. The first one that reproduces the model's logits is the output of its body.
    """
    with in_evaluation_mode(model):
        logits, outputs = _record_module_outputs(model, mx.array(PROBE_TOKENS))
        for module, hidden in reversed(outputs):
            if hidden.shape[-1] == logits.shape[-1]:  # logits themselves, not a body's output
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
    """Return the model's logits, and each outer module's output (batch, length, width).

    Outer are modules of the first MAX_DEPTH levels; their calls are replaced during one pass.

    tokens: (batch, length).
    """
    outputs: list[tuple[nn.Module, mx.array]] = []

    def keeping_output(module: nn.Module) -> Callable[..., Any]:
        """Return the module's call, extended to record an output with a row for each token."""
        original_call = type(module).__call__

        def call(*args: Any, **kwargs: Any) -> Any:
            """Call the module; keep its output if it is an array with one vector per token."""
            output = original_call(module, *args, **kwargs)
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
    """Whether the head, given these rows alone, reproduces the model's logits within rounding."""
    try:
        logits = head.logits(rows)
    except (ValueError, TypeError, IndexError, AttributeError):
        return False  # the layers after this module need more than its output
    if logits.shape != expected.shape:
        return False
    bound = (
        TOLERANCE_IN_EPSILONS
        * float(mx.finfo(expected.dtype).eps)
        * to_float(mx.abs(expected).max())
    )
    return to_float(mx.abs(logits - expected).max()) <= bound


def _has_trained_parameters(head: OutputHead, rows: mx.array, parameters: ParameterRefs) -> bool:
    """Whether the logits of the given rows depend on a trainable parameter, by their gradient."""

    def total(values: dict[str, mx.array]) -> mx.array:
        """Return a scalar that depends on the head's parameters, to take their gradients."""
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


def widen_for_device(batch: MicroBatch) -> MicroBatch:
    """Pad a batch on CUDA to a width that is computed fast; elsewhere return it unchanged.

    Batches built by this project already have such a width.
    """
    tokens, target_mask = batch
    width = np.array(target_mask.shape[1], np.int64)
    padding = int(widen_to_fast_widths(width) - width) if backend.computes_on_cuda() else 0
    if not padding:
        return batch
    at_the_end = ((0, 0), (0, padding))
    return np.pad(tokens, at_the_end), np.pad(target_mask, at_the_end)


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
        with_output_head: returns the form of this loss that computes the logits of some positions
            only; None if the loss needs the model's whole output.
        compile_chunked_evaluation: returns the `EvaluateBatch` of a loss that keeps the logits of
            few positions in memory at a time; None if it keeps those of a whole batch.
        begin: called by every rank before a run is trained or goes on, for what takes long; who
            only asks what a run would need builds the loss without it.
    """

    function: LossFunction
    is_mean: bool = False
    prepare_batch: Callable[..., PreparedBatch] = as_arrays
    count_tokens: Callable[..., mx.array] | None = None
    by_row: RowLossFunction | None = None
    with_output_head: Callable[[OutputHead], Loss] | None = None
    compile_chunked_evaluation: Callable[[Callable[[Flat], None]], EvaluateBatch] | None = None
    begin: Callable[[], None] = lambda: None

    def for_model(self, model: nn.Module, parameters: ParameterRefs) -> Loss:
        """Return the form of this loss for a model, which uses its output head if it has one."""
        if self.with_output_head is None:
            return self
        head = find_output_head(model, parameters)
        return self if head is None else self.with_output_head(head)

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
