"""The control of surprises: the training rows that the finished adapter finds least likely.

A wrong label, a placeholder, an answer in another language: what the rest of the rows contradicts
stays unlikely after training. The rows are listed with their lines. Where most answers are nearly
certain, rows at which the adapter is sure of another answer are counted, and a warning says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from nested_core.data.batches import choose_evaluation_batches, make_batch_arrays
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.gate.checks.judged import CheckedRun
from nested_core.kernels.optimized_model import using_optimized_layers
from nested_core.measure.losses.prediction_comparison import (
    ExamplePredictions,
    PredictionComparison,
)
from nested_core.models.generation import Sampling, answer_prompts
from nested_core.models.lora_attachment import adapter_compute_dtype, load_adapter_tensors
from nested_core.models.parameters import (
    in_evaluation_mode,
    read_parameters,
    reference_trainable_parameters,
)
from nested_core.records.losses import Vector
from nested_core.records.paired_difference import Indices
from nested_core.records.verdict import CheckRow
from nested_core.rooms.controls.answer_rows import AnswerRow, make_split, read_training_rows
from nested_core.rooms.controls.results import Control, NotApplicableError, Result, share_interval

NAME = "training rows that the adapter contradicts"
MAX_ROWS = 2_000
FEWEST_ROWS = 256  # that are read of a large train.jsonl, if there are few held-out rows
MAX_SECONDS = 20.0  # after which no further rows are read
SURE_GAP = 2.0  # nats: another token is seven times as likely
CERTAIN_LOSS = 0.2  # nats: an answer that is nearly certain
MIN_CONTRADICTED = 4
MIN_SHARE = 0.01  # of the rows, that must be contradicted
LISTED_ROWS = 10
SHOWN_TOKENS = 24
SEED = 20_261_129


@dataclass(frozen=True, eq=False)
class GapComparison(PredictionComparison):
    """Measures how sure a model is of another token than the row's, where it is.

    Each row's only divergence is its number of tokens of which another is SURE_GAP likelier.
    """

    def _compare_group(
        self, states: Sequence[mx.array], targets: mx.array
    ) -> tuple[mx.array, mx.array]:
        logits = self._logits(states[0]).astype(mx.float32)
        given = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        is_contradicted = logits.max(axis=-1) - given > SURE_GAP
        losses = mx.logsumexp(logits, axis=-1) - given
        return losses[None], is_contradicted.astype(mx.float32)[None]


@dataclass(frozen=True, eq=False)
class RowSurprises:
    """What the adapter makes of training rows.

    losses: of each answer, in nats, float64 (n,).
    is_contradicted: whether the adapter is sure of another token somewhere in it, bool (n,).
    """

    losses: Vector
    is_contradicted: np.ndarray[tuple[int], np.dtype[np.bool_]]

    @property
    def is_certain(self) -> bool:
        """Whether most answers are nearly certain, so that a contradiction says something."""
        return bool(np.median(self.losses) < CERTAIN_LOSS)

    @property
    def has_too_many(self) -> bool:
        """Whether more rows are contradicted than training leaves of rows that agree."""
        contradicted = int(self.is_contradicted.sum())
        least = max(MIN_CONTRADICTED, MIN_SHARE * len(self.losses))
        return self.is_certain and contradicted >= least

    @property
    def most_surprising(self) -> Indices:
        """The rows with the highest losses, at most LISTED_ROWS, highest first; int64."""
        return np.argsort(-self.losses, kind="stable")[:LISTED_ROWS].astype(np.int64)


def measure_surprises(judged: CheckedRun, train: TokenizedSplit) -> Result:
    """Measure the training rows, and warn of those that the others contradict."""
    held_out = 0 if judged.held_out is None else len(judged.held_out.split)
    rows = read_training_rows(judged, train, count_rows_to_read(len(train), held_out))
    if len(rows) < LISTED_ROWS:
        raise NotApplicableError(f"fewer than {LISTED_ROWS} rows have one answer")
    predictions = _compare_rows(judged, rows)
    read = np.flatnonzero(predictions.tokens)
    surprises = RowSurprises(predictions.losses[0, read], predictions.divergences[0, read] > 0)
    count, total = int(surprises.is_contradicted.sum()), len(read)
    name, verdict = f"{NAME}, {total:,} of {len(train):,}", "rows unlike the rest"
    highest = f"highest loss {surprises.losses.max():.3g} nats"
    if not surprises.has_too_many:
        verdict = "passed" if surprises.is_certain else "not judged: answers are open"
    result = Result([CheckRow(name, None, f"{count} contradicted", highest, verdict=verdict)])
    if surprises.has_too_many:
        at = surprises.most_surprising
        suspects = [rows[index] for index in read[at].tolist()]
        prompts, base = [row.prompt.tolist() for row in suspects], judged.base
        with in_evaluation_mode(base.model):  # the adapter is loaded already
            answers = answer_prompts(base.model, base.tokenizer, prompts, Sampling(SHOWN_TOKENS))
        losses = surprises.losses[at].round(3).tolist()
        columns = zip(suspects, losses, answers, strict=True)
        result.warn(
            "rows_unlike_the_rest",
            count / total,
            f"{count} of {total:,} training rows are unlike the rest: the adapter, which learnt "
            f"them, finds another answer at least seven times as likely. Look at these rows, whose "
            f"answers may be wrong",
            interval=share_interval(count, total),
            lines=[row.tell(row.given, loss, said.text.strip()) for row, loss, said in columns],
        )
    return result


def count_rows_to_read(train: int, held_out: int) -> int:
    """Return how many training rows are read: by the held-out rows, which the gate reads anyway."""
    return min(train, MAX_ROWS, max(FEWEST_ROWS, 2 * held_out))


def _compare_rows(judged: CheckedRun, rows: Sequence[AnswerRow]) -> ExamplePredictions:
    """Measure the rows with the adapter, in a random order of batches, for MAX_SECONDS at most."""
    base, config = judged.base, judged.config
    dtype = adapter_compute_dtype(config, base.model)
    refs = reference_trainable_parameters(base.model, dtype=dtype)
    load_adapter_tensors(base.model, judged.after.to_mlx())
    values = [read_parameters(refs)]
    comparison = GapComparison.of_model(base.model, refs)
    length, ends = config.max_seq_length, time.monotonic() + MAX_SECONDS
    split = make_split([(row.prompt, row.answer) for row in rows], length)
    batches = choose_evaluation_batches(split, config.batch_size, max_seq_length=length)
    order = np.random.default_rng(SEED).permutation(len(batches)).tolist()
    compared = (
        (one.rows, comparison.compare(values, make_batch_arrays(split, one, len(one.rows))))
        for one in (batches[index] for index in order)
        if time.monotonic() < ends
    )
    with using_optimized_layers(base.model):
        return ExamplePredictions.of_batches(compared, len(split))


SURPRISES = Control("surprises", NAME, measure_surprises, is_of_learning=True)
