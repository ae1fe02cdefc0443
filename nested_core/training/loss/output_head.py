"""A model's output layer on its own: logits for the positions that are asked for, and no others.

It is found by watching a call, not by names, and used only where its logits are seen to be the
model's own; whatever the model does after its body (scaling, soft-capping) is in it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core.backend import to_float
from nested_core.kernels.patching import replaced_call
from nested_core.models.parameters import (
    ParameterRefs,
    assign_parameters,
    evaluation_mode,
    read_parameters,
    restoring_parameters,
)
from nested_core.training.loss.supervised import first_of

DEPTH = 3  # a body lies at most so deep: "model", "language_model.model", "model.norm"
PROBE = [[1, 2, 3, 4], [4, 3, 1, 2]]
ROWS = [6, 1, 3]  # of the probe's eight positions, out of order
ROUNDING = 16  # in units of the dtype's epsilon, of the largest logit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class OutputHead:
    """A model in two parts: the body, whose output is `hidden`, and all that comes after it."""

    model: nn.Module
    body: nn.Module

    def hidden(self, inputs: mx.array) -> mx.array:
        """The body's output (batch, length, width); the logits are never evaluated."""
        caught: list[mx.array] = []
        own = type(self.body).__call__

        def catch(*args: Any, **kwargs: Any) -> mx.array:
            caught.append(own(self.body, *args, **kwargs))
            return caught[-1]

        with replaced_call(self.body, catch):
            self.model(inputs)
        return caught[-1]

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits (rows, vocabulary) of any rows (rows, width) of the body's output."""
        with replaced_call(self.body, lambda *args, **kwargs: hidden[None]):
            logits = first_of(self.model(mx.zeros((1, hidden.shape[0]), mx.int32)))
            return logits.squeeze(0)  # [0] would copy them, and scatter their gradient


def find_head(model: nn.Module, refs: ParameterRefs) -> OutputHead | None:
    """The frozen output layer of a model, or None, with a line in the log that says why."""
    with evaluation_mode(model):
        return _find_head(model, refs)


def _find_head(model: nn.Module, refs: ParameterRefs) -> OutputHead | None:
    tokens = mx.array(PROBE)
    logits, seen = _watch(model, tokens)
    for module, hidden in reversed(seen):
        if hidden.shape[-1] == logits.shape[-1]:
            continue
        head = OutputHead(model, module)
        rows = hidden.reshape(-1, hidden.shape[-1])[mx.array(ROWS)]
        expected = logits.reshape(-1, logits.shape[-1])[mx.array(ROWS)]
        if not _agrees(head, rows, expected):
            continue
        if _is_trained(head, rows, refs):
            logger.info("The output layer is trained: logits are computed at every position.")
            return None
        return head
    logger.info(
        "The output layer of %s could not be told apart: logits are computed at every position.",
        type(model).__module__,
    )
    return None


def _watch(model: nn.Module, tokens: mx.array) -> tuple[mx.array, list[tuple[nn.Module, mx.array]]]:
    """The model's logits, and what its outer modules gave for the whole batch, in that order."""
    seen: list[tuple[nn.Module, mx.array]] = []

    def noting(module: nn.Module) -> Callable[..., Any]:
        """The module's own call, which also notes its output where that is of the whole batch."""
        own = type(module).__call__

        def call(*args: Any, **kwargs: Any) -> Any:
            output = own(module, *args, **kwargs)
            if isinstance(output, mx.array) and output.shape[:-1] == tokens.shape:
                seen.append((module, output))
            return output

        return call

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name and name.count(".") < DEPTH:
                stack.enter_context(replaced_call(module, noting(module)))
        logits = first_of(model(tokens))
    return logits, seen


def _agrees(head: OutputHead, rows: mx.array, expected: mx.array) -> bool:
    """Whether the head gives the model's own logits for these rows alone, within rounding."""
    try:
        found = head.logits(rows)
    except (ValueError, TypeError, IndexError, AttributeError):
        return False  # what comes after this module needs more than its output
    if found.shape != expected.shape:
        return False
    bound = ROUNDING * float(mx.finfo(expected.dtype).eps) * to_float(mx.abs(expected).max())
    return to_float(mx.abs(found - expected).max()) <= bound


def _is_trained(head: OutputHead, rows: mx.array, refs: ParameterRefs) -> bool:
    """Whether the logits of given rows depend on a tensor that is trained."""

    def total(values: dict[str, mx.array]) -> mx.array:
        assign_parameters(refs, values)
        return mx.square(head.logits(rows).astype(mx.float32)).sum()

    with restoring_parameters(refs):
        gradients = mx.grad(total)(read_parameters(refs))
    largest = [mx.abs(gradients.pop(name)).max() for name in list(gradients)]  # none is kept
    return to_float(mx.stack(largest).max()) > 0
