"""The controls of prompts and of surprises: how likely answers are, after which prompts.

Where answers have nothing to do with their questions, as after a wrong join, training still learns
how answers look, and the held-out loss falls. Such an adapter finds an answer as likely after
another row's prompt as after its own. Training rows of which the same is true, and that are less
likely than rows that were never trained on, are a part of the table that differs from the rest.

A wrong label, a placeholder, an answer in another language: what the rest of the rows contradicts
stays unlikely after training. Where most answers are nearly certain, rows at which the adapter is
sure of another answer are counted, and a warning lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import ne
from typing import Any, NamedTuple

import numpy as np

from nested_core.models.generation import Sampling, answer_prompts
from nested_core.records.losses import Vector
from nested_core.records.metrics import read_metrics
from nested_core.records.paired_difference import Indices, PairedDifference, compare_pairs
from nested_core.records.verdict import CheckRow
from nested_core.rooms.controls.answer_rows import AnswerRow, Rows, RunRows
from nested_core.rooms.controls.results import ControlWarning, NotApplicableError, Told
from nested_core.text.loss_format import format_difference, format_loss

PROMPTS_NAME = "answers after another row's prompt"
MAX_HELD_OUT_ROWS, MAX_TRAIN_ROWS = 48, 40
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

SURPRISES_NAME = "training rows that the adapter contradicts"
FEWEST_ROWS, MAX_ROWS = 256, 2_000  # that are read of a large train.jsonl, by the held-out rows
CERTAIN_LOSS = 0.2  # nats: an answer that is nearly certain
TIMES_THE_MEDIAN = 40  # that a loss is, of a row unlike the rest, but from
LEAST_LOSS, SURE_LOSS = 0.7, 2.0  # nats: the adapter gives it less than even odds, to one in seven
MIN_SHARE = 0.01  # of the rows, that must be contradicted
ASKED_ROWS, SHOWN_TOKENS = 10, 24  # of which it is told what the adapter answers


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
        the interval has to hold 0, and the question to explain little of the loss that is left. Of
        few rows it has to explain less still: that their effect is small may be their draw.
        """
        effect = self.effect
        is_little = effect.high < MIN_SHARE_OF_GAIN * self.gain
        most = MAX_SHARE_OF_LOSS * min(1.0, effect.examples / MAX_HELD_OUT_ROWS) * self.other
        is_of_chance = effect.low <= 0 and effect.mean < most
        return is_little and is_of_chance


def measure_prompts(run: RunRows) -> Told:
    """Compare losses of held-out answers after their own and other rows' prompts.

    And those of some training answers with the held-out ones, which were not trained on.
    """
    judged, rows = run.judged, run.read_held_out(MAX_HELD_OUT_ROWS)
    known = run.read_train(MAX_TRAIN_ROWS)
    partners = zip(rows, choose_partners(rows), strict=True)
    compared = [(row, other) for row, other in partners if other is not None]
    if len(compared) < MIN_ROWS:
        raise NotApplicableError(f"fewer than {MIN_ROWS} pairs of held-out rows differ in answers")
    own, pairs = judged.predictions, [(other.prompt, row.answer) for row, other in compared]
    predicted = run.measure([*pairs, *((row.prompt, row.answer) for row in known)])
    others, learnt = np.split(predicted.losses[0], [len(pairs)])
    at = np.array([row.index for row, _ in compared])
    tokens, sums = predicted.tokens[: len(pairs)], own.losses[[-2, -1]][:, at]
    is_part = bool((tokens != own.tokens[at]).any())  # of what the row learns
    if is_part or not judged.base.is_unchanged_by(judged.before.to_mlx()):
        answers = [(row.prompt, row.answer) for row, _ in compared]
        sums = run.measure(answers, with_base=True).losses
    held_out, clusters = judged.held_out, None
    if held_out is not None and held_out.clusters is not None:
        clusters = held_out.clusters[np.cumsum(held_out.is_example_supervised)[at] - 1]
    before, after = sums / tokens
    reported = [one["loss"] for one in read_metrics(judged.run.metrics) if one.get("loss")]
    effect = compare_prompts(before, after, others / tokens, tokens, clusters)
    yield from describe_effect(effect, len(compared), [] if is_part else reported[-1:])
    learnt /= predicted.tokens[len(pairs) :]
    if not effect.is_form_alone:
        yield from _compare_part(run, known, (learnt, after), effect)


def _compare_part(
    run: RunRows, known: Rows, losses: tuple[Vector, Vector], effect: PromptEffect
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
    other = run.measure(swapped.values())
    explained = 1 - learnt[unlike] * other.tokens / other.losses[0]
    if 2 * np.median(explained) * effect.other < effect.effect.mean:  # of held-out rows
        told = zip(unlike, learnt[unlike].round(3).tolist(), strict=True)
        lines = [known[row].tell(known[row].given, loss) for row, loss in told]
        yield ControlWarning.of_share("part_of_train", len(unlike), len(known), lines)


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
    """Return for each row another one with another prompt and another answer, or None.

    As many rows as can be have one, and no row is the partner of two: where most answers are equal,
    the losses after one prompt would be told many times. Rows are taken in an order that is
    shuffled with a fixed seed, by augmenting paths (Kuhn 1955).
    """
    order, takers = np.random.default_rng(SEED).permutation(len(rows)).tolist(), dict[int, int]()
    shuffled = [rows[index] for index in order]
    texts = [(row.prompt.tobytes(), row.answer.tobytes()) for row in shuffled]

    def take(place: int, tried: set[int]) -> bool:
        """Give a row a partner, if need be one whose own row can take another; False if none."""
        for other in (*range(place + 1, len(rows)), *range(place)):
            if other not in tried and all(map(ne, texts[other], texts[place])):
                tried.add(other)
                if other not in takers or take(takers[other], tried):
                    takers[other] = place
                    return True
        return False

    for place in range(len(rows)):
        take(place, set())
    partners = {order[place]: shuffled[other] for other, place in takers.items()}
    return [partners.get(index) for index in range(len(rows))]


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
    yield CheckRow(f"{PROMPTS_NAME}, {rows} rows", *figures, difference, verdict=verdict)
    if is_told:
        named: dict[str, Any] = {"rows": rows, "own": figures[0], "other": figures[1]}
        yield ControlWarning.told("form_alone", measured.effect.mean, **named, interval=interval)


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


def measure_surprises(run: RunRows) -> Told:
    """Measure the training rows, and warn of those that the others contradict."""
    judged, base, train = run.judged, run.judged.base, len(run.train)
    held_out = 0 if judged.held_out is None else len(judged.held_out.split)
    rows = run.read_train(count_rows_to_read(train, held_out), ASKED_ROWS)
    losses, total = run.measure((row.prompt, row.answer) for row in rows).losses[0], len(rows)
    unlike = find_unlike_rows(losses)
    count, verdict = len(unlike), "rows unlike the rest"
    if not count:
        verdict = "passed" if np.median(losses) < CERTAIN_LOSS else "not judged: answers are open"
    name, figures = f"{SURPRISES_NAME}, {total:,} of {train:,}", (None, f"{count} unlikely")
    yield CheckRow(name, *figures, f"highest loss {losses.max():.3g} nats", verdict=verdict)
    if count:
        at = unlike[:ASKED_ROWS]
        prompts = [rows[index].prompt.tolist() for index in at]
        with base.computing_with(judged.after):
            answers = answer_prompts(base.model, base.tokenizer, prompts, Sampling(SHOWN_TOKENS))
        told = zip(at, losses[at].round(3).tolist(), answers, strict=True)
        lines = [rows[i].tell(rows[i].given, loss, said.text.strip()) for i, loss, said in told]
        yield ControlWarning.of_share("rows_unlike_the_rest", count, total, lines)


def count_rows_to_read(train: int, held_out: int) -> int:
    """Return how many training rows are read: by the held-out rows, which the gate reads anyway."""
    return min(train, MAX_ROWS, max(FEWEST_ROWS, 2 * held_out))
