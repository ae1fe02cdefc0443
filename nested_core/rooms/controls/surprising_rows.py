"""The control of surprises: the training rows that the finished adapter finds least likely.

A wrong label, a placeholder, an answer in another language: what the rest of the rows contradicts
stays unlikely after training. The rows are listed with their lines. Where most answers are nearly
certain, rows at which the adapter is sure of another answer are counted, and a warning says so.
"""

from __future__ import annotations

import numpy as np

from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.gate.checks.judged import CheckedRun
from nested_core.models.generation import Sampling, answer_prompts
from nested_core.records.losses import Vector
from nested_core.records.paired_difference import Indices
from nested_core.records.verdict import CheckRow
from nested_core.rooms.controls.answer_rows import measure_losses, read_training_rows
from nested_core.rooms.controls.results import Control, ControlWarning, NotApplicableError, Told

NAME = "training rows that the adapter contradicts"
MAX_ROWS = 2_000
FEWEST_ROWS = 256  # that are read of a large train.jsonl, if there are few held-out rows
CERTAIN_LOSS = 0.2  # nats: an answer that is nearly certain
TIMES_THE_MEDIAN = 40  # that a loss is, of a row unlike the rest, but from
LEAST_LOSS = 0.7  # nats: the adapter gives the answer less than even odds, to
SURE_LOSS = 2.0  # nats: one in seven
MIN_UNLIKE = 4
MIN_SHARE = 0.01  # of the rows, that must be contradicted
ASKED_ROWS = 10  # of which it is told what the adapter answers
SHOWN_TOKENS = 24


def find_unlike_rows(losses: Vector) -> Indices:
    """Return the rows whose answers the adapter holds for unlikely, the most unlikely first; int64.

    There are none unless it is nearly certain of most answers, and they are more than training
    leaves of rows that agree. Their loss is far above the usual one: TIMES_THE_MEDIAN, but at least
    LEAST_LOSS and at most SURE_LOSS.

    losses: of each answer, in nats, float64 (n,).
    """
    median = float(np.median(losses))
    bar = np.clip(TIMES_THE_MEDIAN * median, LEAST_LOSS, SURE_LOSS)
    unlike = np.flatnonzero(losses > bar).astype(np.int64)
    is_told = len(unlike) >= max(MIN_UNLIKE, MIN_SHARE * len(losses)) and median < CERTAIN_LOSS
    return unlike[np.argsort(-losses[unlike], kind="stable")] if is_told else unlike[:0]


def measure_surprises(judged: CheckedRun, train: TokenizedSplit) -> Told:
    """Measure the training rows, and warn of those that the others contradict."""
    held_out = 0 if judged.held_out is None else len(judged.held_out.split)
    rows = read_training_rows(judged, train, count_rows_to_read(len(train), held_out))
    if len(rows) < ASKED_ROWS:
        raise NotApplicableError(f"fewer than {ASKED_ROWS} rows have one answer")
    base, total = judged.base, len(rows)
    pairs = [(row.prompt, row.answer) for row in rows]
    losses = measure_losses(base, [judged.after.to_mlx()], pairs).losses[0]
    unlike = find_unlike_rows(losses)
    count, verdict = len(unlike), "rows unlike the rest"
    if not count:
        verdict = "passed" if np.median(losses) < CERTAIN_LOSS else "not judged: answers are open"
    name, highest = f"{NAME}, {total:,} of {len(train):,}", f"highest loss {losses.max():.3g} nats"
    yield CheckRow(name, None, f"{count} unlikely", highest, verdict=verdict)
    if count:
        at = unlike[:ASKED_ROWS]
        prompts = [rows[index].prompt.tolist() for index in at]
        with base.computing_with(judged.after):
            answers = answer_prompts(base.model, base.tokenizer, prompts, Sampling(SHOWN_TOKENS))
        told = zip(at, losses[at].round(3).tolist(), answers, strict=True)
        yield ControlWarning.of_share(
            "rows_unlike_the_rest",
            *(count, total),
            f"{count} of {total:,} training rows are unlike the rest: the adapter, which learnt "
            f"them, holds their answers for unlikely still, and is nearly certain of the others. "
            f"Look at these rows, whose answers may be wrong",
            lines=[rows[i].tell(rows[i].given, loss, said.text.strip()) for i, loss, said in told],
        )


def count_rows_to_read(train: int, held_out: int) -> int:
    """Return how many training rows are read: by the held-out rows, which the gate reads anyway."""
    return min(train, MAX_ROWS, max(FEWEST_ROWS, 2 * held_out))


SURPRISES = Control("surprises", NAME, measure_surprises, is_of_learning=True)
