"""The mean loss over batches, and logits on fixed prompts, for whatever adapter is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nested_core.backend import to_float
from nested_core.data.batches import batch_arrays, evaluation_batches
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.models.parameters import (
    ParameterRefs,
    assign_parameters,
    evaluation_mode,
    restoring_parameters,
)
from nested_core.optim.gradients import Flat
from nested_core.training.distributed import SINGLE_PROCESS, World
from nested_core.training.loss.supervised import SUPERVISED, LossRule, MicroBatch, first_of

Prompts = Sequence[Sequence[int]]
MAX_PROMPTS, MAX_PROMPT_TOKENS, MAX_COLUMNS = 4, 16, 256


class EvaluationCut(Exception):  # noqa: N818  # no error: the trainer turns it into a stop
    """A stop was asked for in the middle of an evaluation; nothing of it counts."""


class Evaluator:
    """Evaluates adapter tensors in a model that is borrowed; `refs` are their places in it.

    `is_cut` is asked before every batch; once it says so, `loss` raises EvaluationCut. Among ranks
    each looks at its own rows of every batch, and all get the same loss.
    """

    def __init__(
        self,
        model: nn.Module,
        refs: ParameterRefs,
        rule: LossRule = SUPERVISED,
        is_cut: Callable[[], bool] = lambda: False,
        prompts: Prompts = (),
        world: World = SINGLE_PROCESS,
    ) -> None:
        self._model, self._refs, self._rule = model, refs, rule
        self._is_cut, self._prompts, self._world = is_cut, prompts, world
        self._compiled = mx.compile(self._sums)

    def loss(self, params: Flat, batches: Iterable[MicroBatch]) -> float:
        """Mean cross-entropy a supervised token, in nats, with dropout off."""
        total, count = mx.array(0.0), mx.array(0)
        with evaluation_mode(self._model), restoring_parameters(self._refs):
            for batch in batches:
                if self._is_cut():
                    raise EvaluationCut
                loss, supervised = self._compiled(params, *self._rule.arrange(batch))
                total = total + self._rule.weighted(loss, supervised)
                count = count + supervised
                mx.eval(total, count)
        sums = self._world.total({"loss": total, "count": count})
        return to_float(sums["loss"] / sums["count"])

    def fixed_logits(self, params: Flat) -> dict[str, Any]:
        """What the model says next after each prompt, at up to 256 places of its vocabulary.

        `prompts`, `columns` and `values` (a row a prompt, float32): what a fresh process that loads
        the published adapter must compute again.
        """
        with evaluation_mode(self._model), restoring_parameters(self._refs):
            assign_parameters(self._refs, params)
            rows = [_last_logits(self._model(mx.array([prompt]))) for prompt in self._prompts]
        size = len(rows[0]) if rows else 0
        columns = np.linspace(0, size - 1, min(size, MAX_COLUMNS)).astype(int).tolist()
        values = [row[columns].tolist() for row in rows]
        prompts = [list(map(int, prompt)) for prompt in self._prompts]
        return {"prompts": prompts, "columns": columns, "values": values}

    def _sums(self, params: Flat, tokens: mx.array, learnt: mx.array) -> tuple[mx.array, mx.array]:
        assign_parameters(self._refs, params)
        return self._rule.value(self._model, tokens, learnt)


def _last_logits(output: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(first_of(output)[0, -1].astype(mx.float32))


def choose_prompts(splits: Mapping[str, TokenizedSplit]) -> Prompts:
    """How the first examples of the validation set begin, or else those of the training set."""
    split = splits["valid"] if len(splits.get("valid", ())) else splits["train"]
    examples = [split.example(row) for row in range(min(len(split), MAX_PROMPTS))]
    return [example[:MAX_PROMPT_TOKENS].tolist() for example in examples if len(example)]


def fixed_batches(
    split: TokenizedSplit, batch_size: int, max_batches: int, max_seq_length: int
) -> Iterable[MicroBatch]:
    """The same batches in the same order every time; -1 is all, fewer are spread over lengths."""
    chosen = evaluation_batches(split, batch_size, max_batches, max_seq_length=max_seq_length)
    return (batch_arrays(split, batch, batch_size) for batch in chosen)
