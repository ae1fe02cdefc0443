"""The loss that a run trains with by default: the cross-entropy of the supervised tokens.

`supervised_loss` is its plain form, for any model. If the output layer is frozen and can be told
apart from the layers before it (`OutputHead`), the loss is computed in chunks of the supervised
positions, so that a batch's logits never exist all at once. Each chunk's gradient with respect to
the body's output is computed together with its loss, so that its logits can be freed before those
of the next chunk exist.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core import backend
from nested_core.backend import to_float
from nested_core.data.batches import widen_to_fast_widths
from nested_core.kernels.exponential import exponential
from nested_core.kernels.patching import replacing_call
from nested_core.kernels.quantized_linear import sharing_dequantized_weights
from nested_core.models.parameters import (
    ParameterRefs,
    assign_parameters,
    in_evaluation_mode,
    read_parameters,
    restoring_parameters,
)
from nested_core.optim.gradients import Flat
from nested_core.training.loss.logit_budget import positions_at_once, positions_without_gradient
from nested_core.training.loss.loss_interface import (
    Arrays,
    EvaluateBatch,
    Loss,
    MicroBatch,
    as_arrays,
    extract_logits,
)

MIN_COMPUTED_POSITIONS = 64
SHARE_COMPUTED_AS_ALL = 0.9  # of the positions: if more are supervised, all are computed
MAX_DEPTH = 3  # most dotted parts in the name of a body: "model", "language_model.model"
PROBE_TOKENS = [[1, 2, 3, 4], [4, 3, 1, 2]]
PROBE_ROWS = [6, 1, 3]  # some of the probe's eight positions, out of order
TOLERANCE_IN_EPSILONS = 16  # in units of the dtype's epsilon, relative to the largest logit

logger = logging.getLogger(__name__)


def supervised_loss(model: Any, tokens: mx.array, target_mask: mx.array) -> Arrays:
    """Return the sum of the cross-entropy over supervised tokens, and their number.

    Padding never counts.

    Args:
        model: maps inputs (batch, length) to logits (batch, length, vocabulary), or to a tuple that
            starts with them.
        tokens: (batch, length + 1) int32; token t + 1 is predicted from tokens up to t.
        target_mask: (batch, length) bool, whether the target (tokens 1, 2, ... of each row) counts.

    Returns:
        Two scalars: float32 sum in nats, int32 count.
    """
    total, count, _ = supervised_loss_by_row(model, tokens, target_mask)
    return total, count


def supervised_loss_by_row(
    model: Any, tokens: mx.array, target_mask: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return sum and count as `supervised_loss`, and the sum of each row, float32 (batch,)."""
    logits = extract_logits(model(tokens[:, :-1]))
    counted = nn.losses.cross_entropy(logits.astype(mx.float32), tokens[:, 1:]) * target_mask
    return counted.sum(), target_mask.sum(), counted.sum(axis=1)


def fit_to_output_head(model: nn.Module, parameters: ParameterRefs) -> Loss:
    """Return the chunked form of the supervised loss for a model with an output head.

    Without one, return SUPERVISED_LOSS.
    """
    head = find_output_head(model, parameters)
    return SUPERVISED_LOSS if head is None else make_chunked_cross_entropy(head)


SUPERVISED_LOSS = Loss(
    supervised_loss,
    by_row=supervised_loss_by_row,
    prepare_batch=lambda batch: as_arrays(widen_for_device(batch)),
    fit_to_model=fit_to_output_head,
)


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


@dataclass(frozen=True, eq=False)
class OutputHead:
    """A model split in two: `body` computes hidden states, and the rest computes the logits."""

    model: nn.Module
    body: nn.Module

    def hidden(self, inputs: mx.array) -> mx.array:
        """Return the body's output (batch, length, width); the logits are never evaluated."""
        outputs: list[mx.array] = []
        original_call = type(self.body).__call__

        def keep_output(*args: object, **kwargs: object) -> mx.array:
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

    def keeping_output(module: nn.Module) -> Callable[..., object]:
        """Return the module's call, extended to record an output with a row for each token."""
        original_call = type(module).__call__

        def call(*args: object, **kwargs: object) -> object:
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


def make_chunked_cross_entropy(head: OutputHead, chunk_rows: int | None = None) -> Loss:
    """Return a loss with the values of `supervised_loss` that never holds all logits in memory.

    The output head is applied to a chunk of supervised positions at a time, and the chunks' losses
    are added.

    head: computes logits from the outputs of the model's body.
    chunk_rows: positions in a chunk of a training step; None uses `positions_at_once`.
    """
    loss = ChunkedCrossEntropy(head, chunk_rows)
    return Loss(
        loss.differentiable_loss,
        prepare_batch=pad_and_find_supervised_positions,
        compile_chunked_evaluation=loss.compile_evaluation,
    )


def pad_and_find_supervised_positions(
    batch: MicroBatch, position_counts: Mapping[int, int] | None = None
) -> Arrays:
    """Pad a batch's rows to a length that is fast on this device; find its supervised positions.

    Returns what `find_supervised_positions` does.
    """
    return find_supervised_positions(widen_for_device(batch), position_counts)


def find_supervised_positions(
    batch: MicroBatch, position_counts: Mapping[int, int] | None = None
) -> Arrays:
    """Return a batch's tokens, and its supervised positions in the flattened batch, padded with -1.

    A position is supervised if its target token counts for the loss. The positions are int32, and
    their number is a part of the shape, so that another number means another compilation.
    `position_counts` has a fixed number for each width of a batch. A batch of another width, or
    with more supervised positions, gets its number rounded up to a few possible values. If nearly
    all positions are supervised, all are returned: choosing among them would save nothing.
    """
    tokens, target_mask = batch  # (batch, width) and (batch, width - 1)
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
    """Round a number of supervised positions up to `size`, half of it, a quarter and so on.

    Each count means another compilation, which pays off if it halves the number of logits.
    """
    count = size
    while (half := -(-count // 2)) >= max(supervised, MIN_COMPUTED_POSITIONS):
        count = half
    return count


@dataclass(frozen=True, eq=False)
class ChunkedCrossEntropy:
    """The sum of the cross-entropy over some positions of a batch, computed in chunks.

    The methods take `rows`: positions in the flattened batch, where -1 is padding.
    """

    head: OutputHead
    chunk_rows: int | None

    def compile_evaluation(self, assign: Callable[[Flat], None]) -> EvaluateBatch:
        """Return a function that computes the loss without gradient, one chunk of logits at a time.

        The function takes parameter values, tokens (batch, width) and the positions whose loss
        counts: indices (n,) into the flattened batch of batch * (width - 1) target tokens, where -1
        is padding. Its loss equals that of `differentiable_loss` within rounding, and bit for bit
        if the output layer gives a position the same logits in a chunk of any size. A CPU's does
        under some kernels of OpenBLAS, such as SkylakeX's, and not under Haswell's.

        assign: puts parameter values into the model.
        """

        def find_states(values: Flat, tokens: mx.array, positions: mx.array) -> Arrays:
            """Return the body's output (n, dimensions) and target token (n,) of each position."""
            assign(values)
            hidden, targets = self._flatten_batch(tokens)
            return gather_rows(hidden, positions), gather_rows(targets, positions)

        def compute_losses(hidden: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
            """Return the loss of each position, float32 (positions,), 0 where the mask is false."""
            size = positions_without_gradient(self._count_words(hidden))
            chunks = chain_chunks(
                [hidden],
                size,
                lambda parts, at: self._compute_chunk(parts[0], targets[at], mask[at])[:1],
            )
            return mx.concatenate([losses for (losses,) in chunks])

        # Compiled apart, so that `evaluate` can wait for each chunk before it begins the next
        compiled_states = mx.compile(find_states)
        compiled_losses = mx.compile(compute_losses)

        def evaluate(
            values: Flat, tokens: mx.array, positions: mx.array
        ) -> tuple[mx.array, mx.array, mx.array]:
            """Return the summed loss, the number of positions without padding, and row sums.

            A row sum is the summed loss of one row of the batch, (batch,).
            """
            hidden, targets = compiled_states(values, tokens, positions)
            mask, size = positions >= 0, self._rows_of_chunk(hidden)
            losses = []
            for start in range(0, positions.size, size):
                chunk = slice(start, start + size)
                losses.append(compiled_losses(hidden[chunk], targets[chunk], mask[chunk]))
                mx.eval(losses[-1])  # or many chunks' logits would exist at once
            batch, width = tokens.shape
            row_of_position = mx.repeat(mx.arange(batch), width - 1)
            batch_rows = row_of_position[mx.maximum(positions, 0)]  # padding adds 0 to row 0
            of_positions = mx.concatenate(losses)
            row_sums = mx.zeros((batch,)).at[batch_rows].add(of_positions)
            return of_positions.sum(), mask.sum(), row_sums

        return evaluate

    def differentiable_loss(self, model: nn.Module, tokens: mx.array, rows: mx.array) -> Arrays:
        """Return the summed loss and the number of positions, differentiable through the body."""
        return self.position_losses(tokens, rows).sum(), (rows >= 0).sum()

    def position_losses(self, tokens: mx.array, rows: mx.array) -> mx.array:
        """Return the loss of each of these positions, float32 (rows,), 0 for padding.

        The gradient is computed in the forward pass already, chunk by chunk, so that the logits of
        all positions never exist at once. For a loss that weights positions individually.

        tokens: (batch, width). rows: positions in the flattened batch; -1 is padding.
        """
        hidden, targets = self._flatten_batch(tokens)

        @mx.custom_function
        def losses(hidden: mx.array) -> Arrays:
            """Return the losses, and the gradients that the backward pass needs."""
            selected, mask = gather_rows(hidden, rows), rows >= 0
            values, gradient = self._compute_chunks(selected, gather_rows(targets, rows), mask)
            return mx.concatenate(values), gradient

        @losses.vjp
        def _(hidden: mx.array, cotangents: Arrays, outputs: Arrays) -> mx.array:
            """Compute the gradient of the hidden states from the one stored in the forward pass."""
            gradient = outputs[1] * cotangents[0][:, None].astype(outputs[1].dtype)
            return _scatter_rows(gradient, rows, hidden.shape[0])

        losses_and_gradients: Any = losses(hidden)
        position_losses: mx.array = losses_and_gradients[0]
        return position_losses

    def _flatten_batch(self, tokens: mx.array) -> Arrays:
        """Return the body's output (positions, width), and the target token of each position."""
        hidden = self.head.hidden(tokens[:, :-1])
        return hidden.reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)

    def _count_words(self, hidden: mx.array) -> int:
        """Return the number of logits at a position, which is the vocabulary size."""
        return self.head.logits(hidden[:1]).shape[-1]

    def _rows_of_chunk(self, hidden: mx.array) -> int:
        """Return how many rows of hidden states are computed at once."""
        return self.chunk_rows or positions_at_once(self._count_words(hidden))

    def _compute_chunks(
        self, hidden: mx.array, targets: mx.array, mask: mx.array
    ) -> tuple[list[mx.array], mx.array]:
        """Return each chunk's losses (rows,), and the gradient of all positions (rows, width)."""
        chunks = chain_chunks(
            [hidden],
            self._rows_of_chunk(hidden),
            lambda parts, at: self._compute_chunk(parts[0], targets[at], mask[at]),
        )
        losses, gradients = zip(*chunks, strict=True)
        return list(losses), mx.concatenate(list(gradients))

    def _compute_chunk(self, hidden: mx.array, targets: mx.array, mask: mx.array) -> Arrays:
        """Return a chunk's losses (rows,) and gradient (rows, width).

        MLX, which is lazy, does not compute the gradient if it is not used.
        """
        head_logits = self.head.logits(hidden)
        logits = head_logits.astype(mx.float32)
        largest = logits.max(axis=-1, keepdims=True)
        powers = exponential(logits - largest)  # one exponential serves the loss and the gradient
        total = powers.sum(axis=-1, keepdims=True)
        picked = mx.take_along_axis(logits, targets[:, None], axis=-1)
        # `where`, because a padded position may have an infinite loss, and inf * 0 is NaN
        losses = mx.where(mask, (mx.log(total) + (largest - picked))[:, 0], 0)
        is_target = mx.arange(logits.shape[-1])[None] == targets[:, None]
        logit_gradient = ((powers / total - is_target) * mask[:, None]).astype(head_logits.dtype)
        _, (gradient,) = mx.vjp(self.head.logits, [hidden], [logit_gradient])
        return losses, gradient


def chain_chunks(
    states: Sequence[mx.array],
    size: int,
    compute: Callable[[Sequence[mx.array], slice], tuple[mx.array, ...]],
) -> list[tuple[mx.array, ...]]:
    """Return the results of `compute` for each chunk of rows, computed one after the other.

    Each chunk depends on the results of the previous one, so that only one chunk's logits exist at
    a time.

    Args:
        states: arrays with the same number of rows, from which logits are computed.
        size: the number of rows in a chunk.
        compute: receives the chunk's rows of each of `states`, and the slice of all rows that they
            are.
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


def gather_rows(values: mx.array, rows: mx.array) -> mx.array:
    """Return values[rows]; padding (-1) gathers row 0 and must be masked later.

    If `rows` selects every row, the values are returned unchanged.
    """
    return values if rows.size == values.shape[0] else values[mx.maximum(rows, 0)]


def _scatter_rows(gradient: mx.array, rows: mx.array, count: int) -> mx.array:
    """Return the gradient of `gather_rows` with respect to its `count` values, zero elsewhere.

    No row is selected twice, so each value looks its gradient up instead of summing.
    """
    if rows.size == count:
        return gradient
    # An array, because a Python number becomes a part of the kernel, compiled for each width anew.
    indices = mx.where(rows < 0, mx.full((1,), count, mx.int32), rows)
    # `source[i]` is the row of the gradient for value i, by default the row of zeros at the end.
    source = mx.put_along_axis(
        mx.full((count + 1,), rows.size, mx.int32), indices, mx.arange(rows.size, dtype=mx.int32), 0
    )
    zero_row = mx.zeros((1, gradient.shape[-1]), gradient.dtype)
    return mx.concatenate([gradient, zero_row])[source[:count]]
