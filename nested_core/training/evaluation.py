"""Evaluate parameter values in a model: the mean loss over batches, and logits on fixed prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core.backend import to_float
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.models.parameters import (
    ParameterRefs,
    assign_parameters,
    in_evaluation_mode,
    restoring_parameters,
)
from nested_core.optim.gradients import Flat
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from nested_core.training.loss.logit_budget import split_batch
from nested_core.training.loss.loss_interface import (
    EvaluateBatch,
    Loss,
    MicroBatch,
    count_logits,
    extract_logits,
)
from nested_core.training.world import SINGLE_PROCESS_WORLD, World

Prompts = Sequence[Sequence[int]]
MAX_PROMPTS = 4
MAX_PROMPT_TOKENS = 16
MAX_READ_EXAMPLES = 64  # among which prompts are chosen
MAX_LOGIT_COLUMNS = 256


class EvaluationInterrupted(Exception):  # noqa: N818  # no error: the trainer turns it into a stop
    """A stop was requested during an evaluation, whose results are discarded."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The mean loss per target token, and the summed loss of each row of all batches, in order.

    row_sums: float64 (rows of all batches,), including rows without an example; None if the loss
        does not compute the loss of single rows.
    """

    mean_loss: float
    row_sums: np.typing.NDArray[np.float64] | None


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates parameter values in a model, and restores the model's own parameters afterwards.

    Args:
        model: the model with its adapter attached.
        parameters: references to the parameters that are evaluated.
        loss_fn: the loss; it is reported per token whether it is a sum or a mean.
        prompts: token ids of the prompts of `logits_on_fixed_prompts`.
        is_stop_requested: called before every batch; if it returns true, `evaluate` raises
            EvaluationInterrupted.
        world: the ranks; each evaluates its rows of every batch, and all get the same loss.
    """

    model: nn.Module
    parameters: ParameterRefs
    loss_fn: Loss = SUPERVISED_LOSS
    prompts: Prompts = field(default=(), kw_only=True)
    is_stop_requested: Callable[[], bool] = field(default=lambda: False, kw_only=True)
    world: World = field(default=SINGLE_PROCESS_WORLD, kw_only=True)

    @cached_property
    def _evaluate_batch(self) -> EvaluateBatch:
        """The compiled function that computes the losses of one batch."""
        return self.loss_fn.compile_evaluation(
            self.model, partial(assign_parameters, self.parameters)
        )

    @cached_property
    def _vocabulary(self) -> int:
        """The number of logits per position."""
        return count_logits(self.model)

    def evaluate(self, values: Flat, batches: Iterable[MicroBatch]) -> Evaluation:
        """Return the mean loss, with the loss of each row if the loss function computes it.

        The mean is over the target tokens of all batches, and of all processes that train together.
        Dropout is off. Raises EvaluationInterrupted if a stop is requested.

        values: the parameter values to evaluate.
        """
        rows: list[mx.array] = []
        total = mx.array(0.0)
        count = mx.array(0)
        with in_evaluation_mode(self.model), restoring_parameters(self.parameters):
            for batch in chain.from_iterable(map(self._split, batches)):
                if self.is_stop_requested():
                    raise EvaluationInterrupted
                loss, tokens, *row_sums = self._evaluate_batch(
                    values, *self.loss_fn.prepare_batch(batch)
                )
                rows += row_sums
                total = total + self.loss_fn.sum_over_target_tokens(loss, tokens)
                count = count + tokens
                mx.eval(total, count, *row_sums)
        sums = self.world.sum_scalars_over_ranks({"loss": total, "count": count})
        mean_loss = to_float(sums["loss"] / sums["count"])
        return Evaluation(mean_loss, self.world.gather_row_sums(rows) if rows else None)

    def _split(self, batch: MicroBatch) -> Iterable[MicroBatch]:
        """Split a batch into parts whose logits fit the logit budget.

        A loss that computes few logits at a time, or not the loss of single rows, gets the whole
        batch.
        """
        if self.loss_fn.is_chunked or self.loss_fn.by_row is None:
            return (batch,)
        return split_batch(batch, self._vocabulary)

    def logits_on_fixed_prompts(self, values: Flat) -> dict[str, object]:
        """Return the next-token logits after each prompt, in up to 256 columns of the vocabulary.

        A dictionary of `prompts`, `columns` and `values` (a row for each prompt, float32). A fresh
        process that loads the published adapter must compute the same values.
        """
        with in_evaluation_mode(self.model), restoring_parameters(self.parameters):
            assign_parameters(self.parameters, values)
            last = (extract_logits(self.model(mx.array([p])))[0, -1] for p in self.prompts)
            rows = [np.array(logits.astype(mx.float32)) for logits in last]
        vocabulary = len(rows[0]) if rows else 0
        columns = np.linspace(0, vocabulary - 1, min(vocabulary, MAX_LOGIT_COLUMNS)).astype(int)
        return {
            "prompts": [list(map(int, prompt)) for prompt in self.prompts],
            "columns": columns.tolist(),
            "values": [row[columns].tolist() for row in rows],
        }


def choose_prompts(splits: Mapping[str, TokenizedSplit]) -> Prompts:
    """Return the first and the last tokens of a few validation examples, or training examples.

    Training examples are used if there is no validation set. No two prompts are equal: the first
    tokens of all examples may be one system prompt, after which a narrow dtype rounds alike.
    """
    split = splits["valid"] if len(splits.get("valid", ())) else splits["train"]
    examples = (split.example(row).tolist() for row in range(min(len(split), MAX_READ_EXAMPLES)))
    cut = ((*tokens[:1], *tokens[1:][1 - MAX_PROMPT_TOKENS :]) for tokens in examples if tokens)
    return list(dict.fromkeys(cut))[:MAX_PROMPTS]
