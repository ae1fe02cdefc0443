"""The control of surprises: the training rows that the finished adapter finds least likely.

A wrong label, a placeholder, an answer in another language: what the rest of the rows contradicts
stays unlikely after training. The rows are listed with their lines. Where most answers are nearly
certain, rows at which the adapter is sure of another answer are counted, and a warning says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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
from nested_core.rooms.controls.answer_rows import (
    AnswerRow,
    decode,
    find_training_row,
    make_split,
    read_answer_rows,
)
from nested_core.rooms.controls.results import (
    ControlFigure,
    ControlResult,
    ControlWarning,
    SuspectLine,
    not_applicable,
    share_interval,
)

CONTROL = "surprises"
NAME = "training rows that the adapter contradicts"
MAX_ROWS = 2_000
FEWEST_ROWS = 256  # that are read of a large train.jsonl, if there are few held-out rows
ROWS_AT_ONCE = 64
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


def measure_surprises(judged: CheckedRun, train: TokenizedSplit) -> ControlResult:
    """Measure the training rows, and warn of those that the others contradict."""
    held_out = 0 if judged.held_out is None else len(judged.held_out.split)
    rows = read_answer_rows(train, count_rows_to_read(len(train), held_out))
    if len(rows) < LISTED_ROWS:
        return not_applicable(CONTROL, NAME, f"fewer than {LISTED_ROWS} rows have one answer")
    order = np.random.default_rng(SEED).permutation(len(rows)).tolist()
    measured = list(_measure_in_parts(judged, [rows[index] for index in order]))
    read = [row for part, _ in measured for row in part]
    surprises = RowSurprises(
        np.concatenate([part.losses[0] for _, part in measured]),
        np.concatenate([part.divergences[0] > 0 for _, part in measured]),
    )
    count, total = int(surprises.is_contradicted.sum()), len(read)
    conclusion = "passed" if surprises.is_certain else "not judged: answers are open"
    row = ControlFigure(
        control=CONTROL,
        name=f"{NAME}, {total:,} of {len(train):,}",
        after=f"{count} contradicted",
        difference=f"highest loss {surprises.losses.max():.3g} nats",
        result="rows unlike the rest" if surprises.has_too_many else conclusion,
    )
    if not surprises.has_too_many:
        return ControlResult(figures=(row,))
    suspects = [read[index] for index in surprises.most_surprising]
    losses = surprises.losses[surprises.most_surprising].tolist()
    warning = ControlWarning(
        control=CONTROL,
        kind="rows_unlike_the_rest",
        figure=count / total,
        interval=share_interval(count, total),
        lines=tuple(_list_suspects(judged, suspects, losses)),
        words=(
            f"{count} of {total:,} training rows are unlike the rest: the adapter, which learnt "
            f"them, finds another answer at least seven times as likely. Look at these rows, whose "
            f"answers may be wrong"
        ),
    )
    return ControlResult(figures=(row,), warnings=(warning,))


def count_rows_to_read(train: int, held_out: int) -> int:
    """Return how many training rows are read: by the held-out rows, which the gate reads anyway."""
    return min(train, MAX_ROWS, max(FEWEST_ROWS, 2 * held_out))


def _measure_in_parts(
    judged: CheckedRun, rows: Sequence[AnswerRow]
) -> Iterator[tuple[Sequence[AnswerRow], ExamplePredictions]]:
    """Yield rows with what the adapter makes of them, until MAX_SECONDS have passed."""
    base, config = judged.base, judged.config
    refs = reference_trainable_parameters(
        base.model, dtype=adapter_compute_dtype(config, base.model)
    )
    load_adapter_tensors(base.model, judged.after.to_mlx())
    values = [read_parameters(refs)]
    comparison = GapComparison.of_model(base.model, refs)
    began, length = time.monotonic(), config.max_seq_length
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        split = make_split([(row.prompt, row.answer) for row in part], length)
        batches = choose_evaluation_batches(split, config.batch_size, max_seq_length=length)
        with using_optimized_layers(base.model):
            compared = (
                (one.rows, comparison.compare(values, make_batch_arrays(split, one, len(one.rows))))
                for one in batches
            )
            yield part, ExamplePredictions.of_batches(compared, len(split))
        if time.monotonic() - began > MAX_SECONDS:
            return


def _list_suspects(
    judged: CheckedRun, rows: Sequence[AnswerRow], losses: Sequence[float]
) -> Iterator[SuspectLine]:
    """Yield the rows with their answers, and the adapter's answers to their prompts."""
    base = judged.base
    with in_evaluation_mode(base.model):  # the adapter is loaded already
        prompts = [row.prompt.tolist() for row in rows]
        given = answer_prompts(base.model, base.tokenizer, prompts, Sampling(SHOWN_TOKENS))
    expected = decode(base.tokenizer, (row.answer[:SHOWN_TOKENS] for row in rows))
    for row, loss, text, answer in zip(rows, losses, expected, given, strict=True):
        file, line = find_training_row(judged, row)
        yield SuspectLine(
            file=file, line=line, figure=round(loss, 3), text=text, given=answer.text.strip()
        )
