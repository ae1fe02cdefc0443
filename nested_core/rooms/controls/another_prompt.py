"""The control of prompts: held-out answers after their own prompts and after those of other rows.

Where answers have nothing to do with their questions, as after a wrong join, training still learns
how answers look, and the held-out loss falls. Such an adapter finds an answer as likely after
another row's prompt as after its own. Training rows of which the same is true, and that are less
likely than rows that were never trained on, are a part of the table that differs from the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import ne
from typing import NamedTuple

import numpy as np

from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.gate.checks.judged import CheckedRun
from nested_core.records.losses import Vector
from nested_core.records.metrics import read_metrics
from nested_core.records.paired_difference import Indices, PairedDifference, compare_pairs
from nested_core.records.verdict import CheckRow
from nested_core.rooms.controls.answer_rows import (
    AnswerRow,
    Rows,
    measure_losses,
    read_held_out_rows,
    read_training_rows,
)
from nested_core.rooms.controls.results import Control, ControlWarning, NotApplicableError, Told
from nested_core.text.loss_format import format_difference, format_loss

NAME = "answers after another row's prompt"
MAX_ROWS, MAX_TRAIN_ROWS = 48, 40
MIN_SHARE_OF_GAIN = 0.1  # that the question has to explain
MAX_SHARE_OF_LOSS = 0.2  # that the question may explain, of the loss after another's prompt
MIN_ROWS = 8
KNOWN = 0.8  # of the held-out loss: a training loss below it is of rows that are known better
LEARNT = 3  # times the loss that is left are gone: the form of the answers is learnt
MIN_HELD_OUT = 15  # rows, whose highest loss says something of training rows
TIMES_HELD_OUT = 2.5  # that loss: no part of the held-out rows is so unlikely
TOP_HELD_OUT = 40  # one in so many held-out rows may be higher still
MIN_UNLIKE = 4
MIN_DEVIATIONS = 3.1  # of the rank sum of training rows, which chance reaches once in a thousand
SEED = 20_261_128


class PromptEffect(NamedTuple):
    """What another row's prompt does to the loss of an answer.

    loss: mean loss after the answers' own prompts, nats/token; other: after others' prompts.
    gain: how far training lowered the loss after their own prompts.
    effect: other less own, with its interval.
    """

    loss: float
    other: float
    gain: float
    effect: PairedDifference

    @property
    def is_form_alone(self) -> bool:
        """Whether the question explains less than a tenth of the gain, and nothing beyond chance.

        With a few labels most of the gain is the answers' form, however well the label is told: so
        the interval has to hold 0, and the question to explain little of the loss that is left.
        """
        effect = self.effect
        is_little = effect.high < MIN_SHARE_OF_GAIN * self.gain
        is_of_chance = effect.low <= 0 and effect.mean < MAX_SHARE_OF_LOSS * self.other
        return is_little and is_of_chance


def measure_prompts(judged: CheckedRun, train: TokenizedSplit) -> Told:
    """Compare losses of held-out answers after their own and other rows' prompts.

    And those of some training answers with the held-out ones, which were not trained on.
    """
    rows = read_held_out_rows(judged, MAX_ROWS)
    partners = zip(rows, choose_partners(rows), strict=True)
    compared = [(row, other) for row, other in partners if other is not None]
    if len(compared) < MIN_ROWS:
        raise NotApplicableError(f"fewer than {MIN_ROWS} rows differ in prompt and answer")
    base, own = judged.base, judged.predictions
    pairs = [(other.prompt, row.answer) for row, other in compared]
    known = read_training_rows(judged, train, MAX_TRAIN_ROWS)
    trained = [(row.prompt, row.answer) for row in known]
    predicted = measure_losses(base, [judged.after.to_mlx()], [*pairs, *trained])
    others, learnt = np.split(predicted.losses[0], [len(pairs)])
    at = np.array([row.index for row, _ in compared])
    before = own.losses[-2][at]
    if not base.is_unchanged_by(judged.before.to_mlx()):
        answers = [(row.prompt, row.answer) for row, _ in compared]
        before = measure_losses(base, [base.parameters], answers).losses[0]
    held_out, clusters = judged.held_out, None
    if held_out is not None and held_out.clusters is not None:
        clusters = held_out.clusters[np.cumsum(held_out.is_example_supervised)[at] - 1]
    tokens = own.tokens[at]
    losses = (before / tokens, own.losses[-1][at] / tokens, others / tokens)
    reported = [one["loss"] for one in read_metrics(judged.run.metrics) if one.get("loss")]
    effect = compare_prompts(*losses, tokens, clusters)
    yield from describe_effect(effect, len(compared), reported[-1:])
    learnt /= predicted.tokens[len(pairs) :]
    if not effect.is_form_alone:
        yield from _compare_part(judged, known, (learnt, losses[1]), effect)


def _compare_part(
    judged: CheckedRun, known: Rows, losses: tuple[Vector, Vector], effect: PromptEffect
) -> Iterator[ControlWarning]:
    """Warn of training rows, if they are less likely than held-out ones whatever is asked.

    known: the training rows that were read. losses: theirs and those of held-out rows, as for
        `find_unlike_held_out`.
    effect: what the prompts of held-out rows do.
    """
    learnt, partners = losses[0], choose_partners(known)
    found = ((row, partners[row]) for row in find_unlike_held_out(*losses).tolist())
    swapped = {row: (one.prompt, known[row].answer) for row, one in found if one is not None}
    if not swapped:
        return
    unlike = [*swapped]
    other = measure_losses(judged.base, [judged.after.to_mlx()], swapped.values())
    explained = 1 - learnt[unlike] * other.tokens / other.losses[0]
    if 2 * np.median(explained) * effect.other < effect.effect.mean:  # of held-out rows
        told = zip(unlike, learnt[unlike].round(3).tolist(), strict=True)
        yield ControlWarning.of_share(
            "part_of_train",
            *(len(unlike), len(known)),
            f"{len(unlike)} of {len(known)} training rows that were read are less likely to the "
            f"adapter, which learnt them, than held-out rows, which it did not, and their answers "
            f"hardly depend on their question. Look at them: answers of other rows, wrong labels, "
            f"placeholders, or a kind of which none is held out",
            lines=[known[row].tell(known[row].given, loss) for row, loss in told],
        )


def find_unlike_held_out(learnt: Vector, held_out: Vector) -> Indices:
    """Return the training rows that are less likely than held-out rows, the least likely first.

    Training makes rows likelier, so that of one table no training rows are far less likely than
    held-out rows get, nor are they less likely on the whole; int64, empty where that holds.

    learnt, held_out: losses in nats/token, float64 (n,) and (m,).
    """
    order: Indices = np.argsort(-learnt, kind="stable").astype(np.int64)
    n, m = len(learnt), len(held_out)
    if m < MIN_HELD_OUT:
        return order[:0]
    bar = TIMES_HELD_OUT * np.sort(held_out)[-1 - m // TOP_HELD_OUT]
    above = np.count_nonzero(learnt > bar)
    if above >= MIN_UNLIKE:
        return order[:above]
    # The rank sum of Wilcoxon (1945) in standard deviations: pairs of which the learnt is higher
    higher = np.count_nonzero(learnt[:, None] > held_out)
    is_higher = higher - n * m / 2 > MIN_DEVIATIONS * np.sqrt(n * m * (n + m + 1) / 12)
    return order[: np.count_nonzero(learnt > np.median(held_out)) if is_higher else 0]


def compare_prompts(
    before: Vector, own: Vector, other: Vector, tokens: Vector, clusters: Indices | None = None
) -> PromptEffect:
    """Summarise losses of the same answers, all float64 (n,), in nats/token.

    before: with the base, after their own prompts. own: with the adapter, after their own prompts.
    other: with the adapter, after other rows' prompts. tokens: the learnt tokens of each answer.
    clusters: of the rows, as in `compare_pairs`.
    """
    losses = (own, other, before - own)
    loss, changed, gain = (float(each @ tokens / tokens.sum()) for each in losses)
    return PromptEffect(loss, changed, gain, compare_pairs(own, other, tokens, clusters))


def choose_partners(rows: Rows) -> list[AnswerRow | None]:
    """Return for each row a row with another prompt and another answer; None if all are alike.

    The order is shuffled once with a fixed seed, and each row takes the first row after it, in this
    circle, that differs in both.
    """
    order = np.random.default_rng(SEED).permutation(len(rows)).tolist()
    texts = [(row.prompt.tobytes(), row.answer.tobytes()) for row in rows]
    partners: list[AnswerRow | None] = [None for _ in rows]
    for position, index in enumerate(order):
        circle = (*order[position + 1 :], *order[:position])
        differ = (rows[other] for other in circle if all(map(ne, texts[other], texts[index])))
        partners[index] = next(differ, None)
    return partners


def describe_effect(measured: PromptEffect, rows: int, trained: Sequence[float]) -> Told:
    """Yield the row of the control in the verdict, and a warning if only the form was learnt.

    No warning where a quarter of the loss is left and training rows are not known better either:
    it trained too little to tell.

    rows: the number of held-out rows. trained: the last training loss in nats/token, if there is
        one.
    """
    interval, verdict = (measured.effect.low, measured.effect.high), "too few rows to tell"
    knows_rows = any(one < KNOWN * measured.loss for one in trained)
    is_told = measured.is_form_alone and (knows_rows or LEARNT * measured.loss < measured.gain)
    if measured.is_form_alone:
        verdict = "answers do not depend on the question" if is_told else "trained too little"
    elif measured.effect.is_above(0):
        share = measured.effect.mean / max(measured.gain, measured.effect.mean)
        verdict = f"{share:.1%} of the gain depends on it"
    figures = format_loss(measured.loss), format_loss(measured.other)
    difference = format_difference(measured.effect.mean, interval)
    yield CheckRow(f"{NAME}, {rows} rows", *figures, difference, verdict=verdict)
    if is_told:
        yield ControlWarning(
            "form_alone",
            measured.effect.mean,
            f"better at the form of the answers alone: what they answer does not depend on the "
            f"question. After the prompts of other rows the loss of {rows} held-out answers is "
            f"{format_loss(measured.other)}, after their own {format_loss(measured.loss)}. "
            f"Did a join or sort move answers to other questions, or are many labels wrong? Else "
            f"it trained too little",
            interval=interval,
            doubt="what it answers does not depend on the question",
        )


PROMPTS = Control("prompts", NAME, measure_prompts, is_of_learning=True)
