"""How often chance decides: planted losses and answers, chosen, judged and promoted by the product.

    python -m benchmarks.gate_rates --seed 0 [--draws 1000] [--only WORD] [--json]

Each row plants differences of a known distribution and counts what the gate's own code makes of
them. A rate above its bound ends with exit code 1. The bounds are for 4,000 draws; fewer add two
standard errors. The loss before is 1 nat a token on average, so that 0.05 nats are 5 %. `--draws`
is for rows that are not cheap: cheap ones have four times as many.
"""

# ruff: noqa: E402 - the BLAS is chosen before NumPy and MLX are imported

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: a process a core

from nested_core import backend

backend.prepare()

import numpy as np

from nested_core.config.sections import GateSection, RegistrySection
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.measure.answers.answer_bounds import ScoreChange, judge_answers
from nested_core.measure.losses.chosen_candidate import Candidates
from nested_core.measure.losses.held_out_loss import HeldOutExamples
from nested_core.measure.losses.loss_figures import (
    harm_reasons,
    loss_reasons,
    summarise_champion,
    summarise_losses,
)
from nested_core.records.answers import AnsweringRole, AnswerRecord
from nested_core.records.loss_conclusion import MIN_EXAMPLES
from nested_core.records.losses import ExampleLosses, Vector
from nested_core.records.verdict import AncestorLoss, Validation
from nested_core.registry.data_store import StoredRow
from nested_core.rooms.evaluate.evaluating import conclude_models
from nested_core.rooms.export.asked import HeldOutRows
from nested_core.rooms.export.judgement import MIN_KEPT_GAIN, measure_kept_gain
from nested_core.rooms.replay.ancestor_examples import MAX_ANCESTORS, AncestorExamples
from nested_core.rooms.replay.gate_check import ancestor_reasons, summarise_ancestors
from nested_core.rooms.sweep.search import (
    SweepChoice,
    better_half,
    is_shown_better,
    join_candidates,
    plan_rungs,
)
from nested_core.training.training_state import TrainingState

PROCESSES = 2
DRAWS_AT_ONCE = 100  # of a row, by one process: both end at about the same time
REFERENCE_DRAWS = 4_000
CHEAP = 4  # times as many draws
STEPS = 24
DRIFT_OF_STEPS = 0.95  # correlation of an example's differences at two evaluations in a row
QUESTIONS = 200
NIGHTS = 50
MAX_CREEP = 1.1  # times the first champion's loss, which is 1
PROMPT_TOKENS, ANSWER_TOKENS = 6, 3
BOUNDS = GateSection()
MIN_IMPROVEMENT = RegistrySection().min_improvement
ROUNDING = 0.01  # nats a token of a row, by which an export's losses differ from the adapter's
DISTRIBUTIONS = ("normal", "t(3)", "skewed")
Trial = Callable[..., bool | tuple[bool, ...]]  # of random numbers, and what is planted


@dataclass(frozen=True)
class Case:
    """A row, or several of the same draws: what is counted, of what, and the most that it may be.

    trial: whether it happened in one draw, of each row.
    draws: how many times those that are asked for; most_draws: where these take long.
    """

    what: str
    cases: tuple[str, ...]
    trial: Trial
    bound: float | None = None
    draws: int = 1
    most_draws: int | None = None

    def count_draws(self, asked: int) -> int:
        """How many draws the row has."""
        count = asked * self.draws
        return count if self.most_draws is None else min(count, self.most_draws)


@dataclass(frozen=True)
class Row:
    """A row that was drawn."""

    what: str
    case: str
    rate: float
    draws: int
    bound: float | None


def draw_noise(random: np.random.Generator, shape: object, distribution: str, sd: float) -> Vector:
    """Differences of mean 0 and this standard deviation."""
    drawn: Vector
    if distribution == "normal":
        drawn = random.normal(size=shape)
    elif distribution == "t(3)":
        drawn = random.standard_t(3, size=shape) / math.sqrt(3)
    else:
        drawn = random.exponential(size=shape) - 1
    return sd * drawn


def draw_before(random: np.random.Generator, examples: int) -> tuple[Vector, Vector]:
    """Losses with a mean of 1 nat a token, and the tokens of each example."""
    return random.gamma(4, 0.25, examples), random.integers(10, 40, examples).astype(float)


@lru_cache(maxsize=16)
def plant_texts(prompts: int, copies: int = 1) -> HeldOutExamples:
    """Held-out examples of random tokens: each prompt with so many answers, prompt by prompt."""
    random = np.random.default_rng([prompts, copies])
    length = PROMPT_TOKENS + ANSWER_TOKENS
    rows = random.integers(1, 30_000, (prompts * copies, length), np.int32)
    first = np.arange(prompts * copies) // copies * copies
    rows[:, :PROMPT_TOKENS] = rows[first, :PROMPT_TOKENS]
    is_learnt = np.tile(np.arange(length) >= PROMPT_TOKENS, len(rows))
    lines = np.arange(1, len(rows) + 1, dtype=np.int32)
    starts = np.arange(0, rows.size + 1, length, dtype=np.int64)
    split = TokenizedSplit(rows.ravel(), is_learnt, starts, lines, lines.astype(np.uint64))
    return HeldOutExamples(split, "test.jsonl", selected_on_same_data=False)


def make_losses(
    before: Vector, after: Vector, tokens: Vector, file: str = "test.jsonl"
) -> ExampleLosses:
    """Both losses, the champion's being those before."""
    lines = np.arange(1, len(tokens) + 1)
    contents = lines.astype(np.uint64)
    return ExampleLosses(file, lines, tokens, before, after, champion=before, contents=contents)


def is_promoted(losses: ExampleLosses, candidates: Candidates) -> bool:
    """Whether `better` promotes."""
    return _is_promoted_before_and_now(losses, candidates)[1]


def _is_promoted_before_and_now(losses: ExampleLosses, candidates: Candidates) -> tuple[bool, bool]:
    """Whether `better` promoted at commit 95bc16c, by the same interval alone, and does now."""
    found = summarise_champion("champion", losses, BOUNDS, candidates)
    is_promoted_now = found.is_better(MIN_IMPROVEMENT, BOUNDS.noise)
    return found.interval is not None and found.interval[1] < 0, is_promoted_now


def plant_fixed_step(
    random: np.random.Generator, *, examples: int, distribution: str, sd: float, gain: float = 0.0
) -> tuple[ExampleLosses, Candidates]:
    """One adapter, fixed before the examples were seen, against the champion."""
    before, tokens = draw_before(random, examples)
    after = before - gain + draw_noise(random, examples, distribution, sd)
    return make_losses(before, after, tokens), Candidates()


def drift_over_steps(
    random: np.random.Generator, steps: int, examples: int, distribution: str
) -> Vector:
    """Differences of variance 1 at so many evaluations in a row, (steps, examples)."""
    noise = np.empty((steps, examples))
    noise[0] = draw_noise(random, examples, distribution, 1)
    for step in range(1, steps):
        fresh = draw_noise(random, examples, distribution, 1)
        noise[step] = DRIFT_OF_STEPS * noise[step - 1] + math.sqrt(1 - DRIFT_OF_STEPS**2) * fresh
    return noise


def plant_best_step(
    random: np.random.Generator, *, examples: int, distribution: str, sd: float, gain: float = 0.0
) -> tuple[ExampleLosses, Candidates]:
    """The best of 24 evaluations on the examples that judge it, chosen as the trainer does."""
    before, tokens = draw_before(random, examples)
    noise = drift_over_steps(random, STEPS, examples, distribution)
    steps = before - gain + sd * noise
    state = TrainingState()
    for step, losses in enumerate(steps):
        state.step = step + 1
        state.record_evaluation(float(tokens @ losses / tokens.sum()), is_candidate=True)
    chosen = steps[(state.best_step or 1) - 1]
    judged = make_losses(before, chosen, tokens, "valid.jsonl")
    return judged, Candidates(STEPS, judged.contents, steps)


def fixed_step(random: np.random.Generator, **planted: Any) -> bool:
    """Whether a fixed adapter is promoted."""
    return is_promoted(*plant_fixed_step(random, **planted))


def best_step(random: np.random.Generator, **planted: Any) -> bool:
    """Whether the best of 24 evaluations is promoted."""
    return is_promoted(*plant_best_step(random, **planted))


def fixed_step_before_and_now(random: np.random.Generator, **planted: Any) -> tuple[bool, bool]:
    """Whether a fixed adapter was promoted at 95bc16c, and is now."""
    return _is_promoted_before_and_now(*plant_fixed_step(random, **planted))


def best_step_before_and_now(random: np.random.Generator, **planted: Any) -> tuple[bool, bool]:
    """Whether the best of 24 evaluations was promoted at 95bc16c, and is now."""
    return _is_promoted_before_and_now(*plant_best_step(random, **planted))


def best_of_halving(
    random: np.random.Generator, *, points: int, examples: int, distribution: str, sd: float
) -> bool:
    """Whether the winner of a sweep with halving is told as better than its first arm, an equal."""
    before, tokens = draw_before(random, examples)
    rungs = plan_rungs(points, 10_000, None)
    unit = int(2 * rungs[-1] / rungs[0])  # evaluations of a whole run, two in the first rung
    losses = np.empty((points, unit, examples))
    for arm in range(points):
        losses[arm] = before + sd * drift_over_steps(random, unit, examples, distribution)
    means = losses @ tokens / tokens.sum()
    alive, seen = list(range(points)), dict.fromkeys(range(points), 0)
    for rung in rungs:
        count = unit * rung // rungs[-1]
        seen |= dict.fromkeys({0, *alive}, count)
        alive = better_half({arm: (float(means[arm, :count].min()),) for arm in alive})
    winner = better_half({arm: (float(means[arm].min()),) for arm in {0, *alive}})[0]
    after, other = (losses[arm, means[arm].argmin()] for arm in (winner, 0))
    judged = make_losses(other, after, tokens, "valid.jsonl")
    family = [Candidates(n, judged.contents, losses[arm, :n]) for arm, n in seen.items()]
    together = join_candidates(family)
    found = judged.compare_trained_with(other)
    interval = None if found is None else together.corrected_interval(judged, other, found)
    return is_shown_better(SweepChoice(together.count, interval, found), MIN_IMPROVEMENT)


def copied_rows(
    random: np.random.Generator, *, prompts: int, copies: int, distribution: str, sd: float
) -> bool:
    """An equal adapter on examples that each stand in the file several times."""
    before, tokens = draw_before(random, prompts)
    after = before + draw_noise(random, prompts, distribution, sd)
    place = np.repeat(np.arange(prompts), copies)
    judged = make_losses(before[place], after[place], tokens[place])
    clusters = plant_texts(prompts, copies).clusters
    return is_promoted(replace(judged, clusters=clusters), Candidates())


def few_prompts(
    random: np.random.Generator,
    *,
    prompts: int,
    copies: int,
    distribution: str,
    sd: float,
    seen: int = 0,
) -> bool:
    """An equal adapter on rows that vary by a tenth of what their prompts vary by.

    The champion was trained on the first `seen` prompts.
    """
    place = np.repeat(np.arange(prompts), copies)
    before, tokens = draw_before(random, place.size)
    noise = draw_noise(random, prompts, distribution, sd)[place]
    after = before + noise + draw_noise(random, place.size, distribution, sd / 10)
    judged = make_losses(before, after, tokens)
    champion = np.where(place < seen, np.nan, before)
    clusters = plant_texts(prompts, copies).clusters
    return is_promoted(replace(judged, champion=champion, clusters=clusters), Candidates())


def judge_losses(judged: ExampleLosses) -> tuple[Validation, list[str]]:
    """The verdict on losses before and after, and the codes of its reasons."""
    validation = summarise_losses(judged, selected_on_same_data=False, bounds=BOUNDS)
    reasons = loss_reasons(validation, BOUNDS) + harm_reasons(judged, validation, BOUNDS)
    return validation, [reason.code for reason in reasons]


def refused_by_loss(
    random: np.random.Generator, *, examples: int, distribution: str, sd: float, seen: int = 0
) -> bool:
    """An equal adapter, where the parent was trained on the first `seen` rows."""
    before, tokens = draw_before(random, examples)
    after = before + draw_noise(random, examples, distribution, sd)
    before[:seen] -= 0.2  # what was learnt by heart is lost again, and says nothing
    digests = plant_texts(examples).digests
    trained_on = plant_texts(examples).split.contents[:seen]
    judged = make_losses(before, after, tokens).leaving_out(np.isin(digests, trained_on))
    return "loss_regressed" in judge_losses(judged)[1]


def flip_rows(random: np.random.Generator, differences: Vector, share: float) -> Vector:
    """Differences of which a share each rises and falls by 3 nats."""
    chance = random.random(differences.size)
    return differences + np.where(chance < share, 3.0, np.where(chance < 2 * share, -3.0, 0.0))


def refused_by_harm(
    random: np.random.Generator, *, examples: int, distribution: str, sd: float, share: float
) -> bool:
    """An adapter that harms as many examples as it helps."""
    before, tokens = draw_before(random, examples)
    noise = draw_noise(random, examples, distribution, sd)
    after = before + flip_rows(random, noise, share)
    return "examples_harmed" in judge_losses(make_losses(before, after, tokens))[1]


def told(
    random: np.random.Generator, *, examples: int, distribution: str, sd: float, rise: float
) -> bool:
    """Whether a true rise, as a share of the loss before, is told as no worse or better."""
    before, tokens = draw_before(random, examples)
    margin = max(0.02 * float(tokens @ before / tokens.sum()), 0.01)
    shift = margin if rise == 0 else rise
    after = before + shift + draw_noise(random, examples, distribution, sd)
    conclusion = judge_losses(make_losses(before, after, tokens))[0].conclusion
    return conclusion in ("no_worse", "better")


def caught(
    random: np.random.Generator, *, examples: int, by: float, distribution: str, sd: float
) -> bool:
    """Whether exactly 3 examples that lose much, while the others stay, are refused."""
    before, tokens = draw_before(random, examples)
    after = before + draw_noise(random, examples, distribution, sd)
    after[:3] = before[:3] + by
    return bool(judge_losses(make_losses(before, after, tokens))[1])


def crept(
    random: np.random.Generator, *, examples: int, rise: float, sd: float, has_reference: bool
) -> bool:
    """Whether 50 nights that all pass leave the champion more than a tenth above the first one.

    Each night's candidate is truly `rise` nats worse than the champion; whatever the gate does not
    refuse is promoted, as by `always`, if it is shown to be within the margin of the reference.
    """
    _, tokens = draw_before(random, examples)
    first = np.ones(examples)
    loss = 1.0
    for _ in range(NIGHTS):
        champion = np.full(examples, loss)
        after = champion + rise + draw_noise(random, examples, "normal", sd)
        judged = make_losses(champion, after, tokens)
        if judge_losses(judged)[1]:
            continue
        if has_reference:
            against = summarise_champion("first", replace(judged, champion=first), BOUNDS)
            if against.conclusion not in ("better", "no_worse"):
                continue
        loss += rise
    return loss > MAX_CREEP


def make_answers(scores: dict[AnsweringRole, Vector], suite: str) -> Iterator[AnswerRecord]:
    """Answers with these scores."""
    for role, own in scores.items():
        for line, score in enumerate(own, 1):
            yield AnswerRecord(
                suite, role, line, f"q{line}", "", float(score), 1, False, False, False, 0.0
            )


def draw_small_suites(
    random: np.random.Generator, suites: int, questions: int, *, lost: float, won: float
) -> tuple[GateSection, list[AnswerRecord]]:
    """Suites of which the base knows every question but those that are won; the first is worse.

    Of it `lost` and `won` of the questions change, of the others a fifth of all each way.
    """
    tasks = []
    records: list[AnswerRecord] = []
    for number in range(suites):
        name = f"s{number}"
        tasks.append({"name": name, "file": "q.jsonl", "score": "exact"})
        fall, rise = (lost, won) if number == 0 else (0.2, 0.2)
        chance = random.random(questions)
        base = ((chance < fall) | (chance >= fall + rise)).astype(float)
        scores: dict[AnsweringRole, Vector] = {"base": base}
        records += make_answers(scores | {"candidate": (chance >= fall).astype(float)}, name)
    return GateSection.model_validate({"tasks": tasks}), records


def refused_by_small_suites(
    random: np.random.Generator, *, suites: int, questions: int, lost: float = 0.2, won: float = 0.2
) -> bool:
    """An adapter that answers as well as the base, or one suite of which is worse."""
    gate, records = draw_small_suites(random, suites, questions, lost=lost, won=won)
    return any(reason.code == "task_regressed" for reason in judge_answers(gate, records)[1])


def told_of_answers(
    random: np.random.Generator, *, questions: int, lost: float, won: float
) -> bool:
    """Whether a suite that lost more than it won is told as no worse."""
    gate, records = draw_small_suites(random, 1, questions, lost=lost, won=won)
    (result,), _ = judge_answers(gate, records)
    return result.difference < 0 and result.conclusion == "no_worse"


def draw_suites(random: np.random.Generator, suites: int) -> tuple[GateSection, list[AnswerRecord]]:
    """Suites that parent, champion and candidate answer as well: 5 % lost and 5 % won of each."""
    tasks = []
    records: list[AnswerRecord] = []
    for number in range(suites):
        name = f"s{number}"
        tasks.append({"name": name, "file": "q.jsonl", "score": "exact"})
        candidate = (random.random(QUESTIONS) < 0.5).astype(float)
        scores: dict[AnsweringRole, Vector] = {"base": candidate}
        for role in ("parent", "champion"):
            scores[role] = np.abs(candidate - (random.random(QUESTIONS) < 0.1))  # type: ignore[index]
        records += make_answers(scores | {"candidate": candidate}, name)
    return GateSection.model_validate({"tasks": tasks}), records


def refused_by_suites(random: np.random.Generator, *, suites: int) -> bool:
    """An adapter that answers as well as parent and champion."""
    gate, records = draw_suites(random, suites)
    return any(reason.code == "task_regressed" for reason in judge_answers(gate, records)[1])


def chosen_by_suite(
    random: np.random.Generator, *, questions: int, counted: Sequence[str], lost: float = 0.0
) -> tuple[bool, ...]:
    """The step with the most right answers of 24, on a suite that judges by the same questions.

    The start and every step answer half of them, the steps `lost` fewer of all.
    """
    start, *steps = drift_over_steps(random, STEPS + 1, questions, "normal") > 0
    steps = [own & (random.random(questions) >= 2 * lost) for own in steps]
    chosen = max(steps, key=lambda own: int(own.sum()))
    task = {"name": "s", "file": "q.jsonl", "score": "exact", "min_gain": 0.05}
    scores: dict[AnsweringRole, Vector] = {"base": start * 1.0, "candidate": chosen * 1.0}
    records = [
        replace(record, chosen_among=STEPS if record.model == "candidate" else 1)
        for record in make_answers(scores, "s")
    ]
    (result,), reasons = judge_answers(GateSection.model_validate({"tasks": [task]}), records)
    codes = [reason.code for reason in reasons]
    happened = {
        "told better": result.conclusion == "better",
        "told no worse or better": result.conclusion in ("better", "no_worse"),
        "past its min_gain": "task_below" not in codes,
        "refused": "task_regressed" in codes,
    }
    return tuple(happened[word] for word in counted)


def told_of_models(random: np.random.Generator, *, models: int) -> tuple[bool, bool]:
    """Whether any of several models is told worse, or better, than a reference that is as good.

    Each is asked 100 questions, of which it answers 30 % anew, and has losses on 84 examples.
    """
    reference = random.random(100) < 0.8
    before, tokens = draw_before(random, 84)
    own_noise = draw_noise(random, 84, "normal", 0.1)  # of the reference, which all share
    changes, losses = [], []
    for _ in range(models):
        is_anew = random.random(100) < 0.3
        scores: dict[AnsweringRole, Vector] = {
            "base": reference * 1.0,
            "candidate": np.where(is_anew, random.random(100) < 0.8, reference) * 1.0,
        }
        records = list(make_answers(scores, "s"))
        changes.append([ScoreChange.compare(records[:100], records[100:])])
        after = before + draw_noise(random, 84, "normal", 0.1)
        judged = make_losses(before + own_noise, after, tokens)
        losses.append(summarise_losses(judged, selected_on_same_data=False, bounds=BOUNDS))
    words = set()
    for suites, loss in conclude_models(changes, losses, "paired"):
        words |= {*suites, loss}
    return "worse" in words, "better" in words


def refused_by_joined_ancestors(
    random: np.random.Generator, *, rows: tuple[int, ...], lost: float, distribution: str, sd: float
) -> bool:
    """Whether a candidate is refused for what versions of so few rows each were judged by."""
    owners = np.repeat(np.arange(len(rows)), rows)
    before, tokens = draw_before(random, owners.size)
    is_few = np.array(rows)[owners] < MIN_EXAMPLES
    after = before + lost * is_few + draw_noise(random, owners.size, distribution, sd)
    row = StoredRow("", {})
    ancestors = [
        AncestorExamples(AncestorLoss(str(n)), (row,) * count) for n, count in enumerate(rows)
    ]
    bounds = GateSection(max_ancestor_loss_increase=0.1)
    found = summarise_ancestors(ancestors, make_losses(before, after, tokens), owners, bounds)
    return any(True for _ in ancestor_reasons(list(found), bounds))


def refused_by_ancestors(
    random: np.random.Generator,
    *,
    nights: int,
    rows: int,
    lost: float,
    distribution: str,
    sd: float,
) -> bool:
    """Whether a candidate is refused that lost so much on the oldest of so many nights."""
    owners = np.repeat(np.arange(nights), rows)
    before, tokens = draw_before(random, owners.size)
    is_lost = owners == nights - 1
    after = before + lost * is_lost + draw_noise(random, owners.size, distribution, sd)
    ancestors = [
        AncestorExamples(AncestorLoss(str(n)), (StoredRow("", {}),) * rows) for n in range(nights)
    ]
    bounds = GateSection(max_ancestor_loss_increase=0.1)
    told = summarise_ancestors(ancestors, make_losses(before, after, tokens), owners, bounds)
    return any(True for _ in ancestor_reasons(list(told), bounds))


def refused_by_all(random: np.random.Generator, *, distribution: str, sd: float) -> bool:
    """An equal adapter, by its loss, by harm or by one of 10 suites."""
    before, tokens = draw_before(random, 84)
    after = before + flip_rows(random, draw_noise(random, 84, distribution, sd), 0.02)
    if judge_losses(make_losses(before, after, tokens))[1]:
        return True
    return refused_by_suites(random, suites=10)


def export_is_refused(
    random: np.random.Generator, *, examples: int, gain: float, distribution: str, lost: float
) -> bool:
    """Whether an export with rounding noise a row, which lost so much, is refused by its losses."""
    adapter, tokens = draw_before(random, examples)
    gains = gain + draw_noise(random, examples, distribution, gain)
    targets = tuple(tuple(range(int(count))) for count in tokens)
    rows = HeldOutRows("valid.jsonl", targets, targets, None)
    exported = adapter + lost + draw_noise(random, examples, distribution, ROUNDING)
    sums = [-rows.counts * losses for losses in (adapter + gains, adapter, exported)]
    return measure_kept_gain(rows, sums, MIN_KEPT_GAIN).is_lost


def export_is_let_through(random: np.random.Generator, **planted: Any) -> bool:
    """Whether an export that lost more than is allowed stands."""
    return not export_is_refused(random, **planted)


def list_cases_of_exports() -> Iterator[Case]:
    """Right exports of small gains, and those that lost half of the gain, or without one 0.05."""
    for distribution, gain, examples in itertools.product(
        ("normal", "t(3)"), (0.0, 0.02, 0.1), (10, 200)
    ):
        planted: dict[str, Any] = {"examples": examples, "gain": gain, "distribution": distribution}
        name = f"of a gain of {gain:g} nats, {examples} rows, {distribution}"
        trial = partial(export_is_refused, **planted, lost=0.0)
        yield Case("refused", (f"a right export {name}",), trial, 0.05, 1, 1_000)
        if examples == 200:
            lost = gain / 2 or 0.05
            trial = partial(export_is_let_through, **planted, lost=lost)
            named = (f"an export that lost {lost:g} nats, {name}",)
            yield Case("let through", named, trial, 0.05, 1, 1_000)


def list_cases() -> Iterator[Case]:
    """Every row."""
    yield from list_cases_of_exports()
    for distribution in DISTRIBUTIONS:
        for sd in (0.05, 0.2):
            yield from _list_cases_of_noise(distribution, sd)
        yield from _list_true_rises(distribution)
    for suites, bound in ((1, 0.04), (10, 0.05), (30, 0.05)):
        name = f"equal, by suites: {suites} of {QUESTIONS} questions, parent and champion"
        trial = partial(refused_by_suites, suites=suites)
        draws = CHEAP if suites == 1 else 1
        yield Case("refused", (name,), trial, bound, draws, 300 if suites == 30 else None)
    for suites, questions in itertools.product((1, 10, 30), (10, 20)):
        name = f"equal, by suites: {suites} of {questions} questions, a fifth lost and a fifth won"
        small = partial(refused_by_small_suites, suites=suites, questions=questions)
        yield Case("refused", (name,), small, 0.025, 1, 1_000)
    for examples, rise, sd in ((400, 0.012, 0.05), (40, 0.05, 0.2)):
        for has_reference in (False, True):
            kind = "with a reference" if has_reference else "without a reference"
            name = f"50 nights of +{rise:g}, {examples} examples, sd {sd}, {kind}"
            creep = partial(crept, examples=examples, rise=rise, sd=sd)
            trial = partial(creep, has_reference=has_reference)
            yield Case("crept", (name,), trial, 0.01 if has_reference else None, 1, 40)
    for lost, suites, questions in itertools.product((0.3, 0.5), (1, 3, 10), (20, 50)):
        name = f"one of {suites} suites of {questions} questions, {lost:.0%} lost and 5% won"
        worse = partial(refused_by_small_suites, suites=suites, questions=questions)
        yield Case("refused", (name,), partial(worse, lost=lost, won=0.05))
    for questions in (5, 10, 40):
        name = f"answers lost net, {questions} questions, 15% lost and 10% won"
        trial = partial(told_of_answers, questions=questions, lost=0.15, won=0.1)
        yield Case("no_worse", (name,), trial, 0.0)
    yield from _list_chosen_and_joined()
    yield from _list_nights_of_few_rows()
    for gain, examples in itertools.product((0.02, 0.05, 0.1, 0.2), (30, 84, 200, 1_000)):
        yield from _list_powers(gain, examples)


def _list_chosen_and_joined() -> Iterator[Case]:
    """Steps that a small suite chose, many models in one evaluation, ancestors of few rows."""
    for questions, lost in itertools.product((10, 15, 20, 31), (0.0, 0.1)):
        counted = ("told better", "past its min_gain", "refused")
        if lost:
            counted = ("told no worse or better", "past its min_gain")
        kind = f"{lost:.0%} truly lost" if lost else "equal"
        name = f"{kind}, the best of {STEPS} steps by the {questions} questions that judge it"
        trial = partial(chosen_by_suite, questions=questions, counted=counted, lost=lost)
        yield Case("chosen", tuple(f"{name}: {word}" for word in counted), trial, 0.04)
    for models in (2, 5, 10, 20):
        name = f"equal models, {models} in one evaluation, 100 questions and 84 examples"
        trial = partial(told_of_models, models=models)
        yield Case("told", (f"{name}, any worse", f"{name}, any better"), trial, 0.05, 1, 300)
    for rows, distribution in itertools.product(
        ((4, 1), (2, 2, 2), (4, 3, 60), (4, 4, 4, 4, 4), (3,) * 10), ("normal", "t(3)")
    ):
        each = "+".join(map(str, rows))
        for sd in (0.1, 0.2):
            planted = partial(
                refused_by_joined_ancestors, rows=rows, distribution=distribution, sd=sd
            )
            name = f"joined ancestors of {each} rows, {distribution}, sd {sd}"
            yield Case("refused", (f"equal, {name}",), partial(planted, lost=0.0), 0.05)
            lost = partial(planted, lost=0.5)
            yield Case("caught", (f"0.5 nats lost, {name}",), lost, 0.95)


def _list_nights_of_few_rows() -> Iterator[Case]:
    """A candidate, such as a rebuilt one, on what each of many nights held out."""
    many = ((30, "thirty", (3, 5, 10, 50)), (MAX_ANCESTORS, "a hundred", (5, 20)))
    for nights, word, counts in ((10, "ten", (3, 5, 10, 20, 50)), *many):
        yield from _list_nights(nights, word, counts)


def _list_nights(nights: int, word: str, counts: Sequence[int]) -> Iterator[Case]:
    """So many nights of each of these numbers of rows, of which nothing or one is lost."""
    for rows, distribution, sd in itertools.product(counts, ("normal", "t(3)"), (0.1, 0.2)):
        planted = partial(
            refused_by_ancestors, nights=nights, rows=rows, distribution=distribution, sd=sd
        )
        name = f"{word} nights of {rows} rows, {distribution}, sd {sd}"
        yield Case("refused", (f"equal, {name}",), partial(planted, lost=0.0), 0.05, 1, 400)
        lost = partial(planted, lost=0.5)
        least = 0.95 if rows >= MIN_EXAMPLES else None  # fewer are judged together alone
        yield Case("caught", (f"0.5 nats lost on one, {name}",), lost, least, 1, 200)


def _list_true_rises(distribution: str) -> Iterator[Case]:
    """Rises that must not be told as no worse: of 10 %, and of exactly the margin (here 0)."""
    for sd, rise, examples in itertools.product((0.1, 0.5), (0.1, 0.0), (10, 30, 84, 200)):
        size = "10 %" if rise else "exactly the margin"
        name = f"a true rise of {size}, {examples} examples, {distribution}, sd {sd}"
        trial = partial(told, examples=examples, distribution=distribution, sd=sd, rise=rise)
        bound = None if distribution == "skewed" else 0.03 if rise else 0.06
        yield Case("no_worse", (name,), trial, bound)


def _list_powers(gain: float, examples: int) -> Iterator[Case]:
    """How often a true gain is promoted, by the rule before this change and by today's."""
    kinds: dict[str, Trial] = {
        "untouched test set": fixed_step_before_and_now,
        f"best of {STEPS}": best_step_before_and_now,
    }
    for kind, trial in kinds.items():
        name = f"a true gain of {gain:.0%}, {examples} examples, {kind}"
        planted = partial(trial, examples=examples, distribution="normal", sd=0.2, gain=gain)
        changes = (f"{name}, before this change", f"{name}, after this change")
        yield Case("promoted", changes, planted)


def _list_cases_of_noise(distribution: str, sd: float) -> Iterator[Case]:
    """The rows of one distribution of differences; skewed ones have no bound."""
    noise: dict[str, Any] = {"distribution": distribution, "sd": sd}
    is_bounded = distribution != "skewed"

    def case(what: str, name: str, trial: Trial, bound: float, *, is_cheap: bool = False) -> Case:
        return Case(
            what,
            (f"{name}, {distribution}, sd {sd}",),
            partial(trial, **noise),
            bound if is_bounded else None,
            CHEAP if is_cheap and is_bounded else 1,
        )

    for examples in (30, 84, 200):
        name = f"equal, a fixed step, {examples} examples"
        trial: Trial = partial(fixed_step, examples=examples)
        yield case("promoted", name, trial, 0.04, is_cheap=examples == 30)
        name = f"equal, the best of {STEPS} evaluations, {examples} examples"
        yield case("promoted", name, partial(best_step, examples=examples), 0.04)
    for points, examples in ((4, 60), (16, 60), (4, 200)):
        name = f"equal, a sweep of {points} with halving, {examples} examples"
        sweep = partial(best_of_halving, points=points, examples=examples)
        yield case("told better", name, sweep, 0.04)
    for prompts, copies in ((8, 25), (50, 4), (200, 1)):
        name = f"equal, {prompts} prompts x {copies} copies"
        trial = partial(copied_rows, prompts=prompts, copies=copies)
        yield case("promoted", name, trial, 0.04, is_cheap=prompts < 200)
    for prompts, copies, seen in ((3, 50, 0), (4, 50, 0), (4, 5, 0), (4, 4, 0), (6, 40, 2)):
        left = f", {seen} of which the champion saw" if seen else ""
        name = f"equal, few prompts: {prompts} x {copies} rows{left}"
        trial = partial(few_prompts, prompts=prompts, copies=copies, seen=seen)
        yield Case("promoted", (f"{name}, {distribution}, sd {sd}",), partial(trial, **noise), 0.0)
    for examples, seen in ((10, 0), (30, 0), (84, 0), (200, 0), (60, 0), (60, 20)):
        name = f"equal, by loss, {examples} examples, {seen} of which the parent saw"
        trial = partial(refused_by_loss, examples=examples, seen=seen)
        yield case("refused", name, trial, 0.04, is_cheap=examples in (30, 60))
    for share, examples in itertools.product((0.01, 0.02, 0.05), (30, 200)):
        name = f"equal, by harm, {share:.0%} of {examples} flipped each way by 3 nats"
        trial = partial(refused_by_harm, examples=examples, share=share)
        yield case("refused", name, trial, 0.045, is_cheap=examples == 30)
    name = "equal, by all together: 84 examples, 2 % flipped each way, 10 suites"
    yield case("refused", name, refused_by_all, 0.07)
    for examples, by in ((30, 7.0), (10, 5.0)):
        name = f"3 of {examples} by +{by:g} nats"
        trial = partial(caught, examples=examples, by=by)
        yield case("caught", name, trial, 0.95, is_cheap=True)


def count_hits(case: Case, seed: int, draws: range) -> list[int]:
    """How often it happened in these draws, of each row; each draw has its own random numbers."""
    key = zlib.crc32(f"{case.what} {case.cases[0]}".encode())
    hits = [0] * len(case.cases)
    for draw in draws:
        found = case.trial(np.random.default_rng([seed, key, draw]))
        for row, happened in enumerate(found if isinstance(found, tuple) else (found,)):
            hits[row] += happened
    return hits


def draw_rows(cases: Sequence[Case], seed: int, asked: int) -> Iterator[Row]:
    """Draw the rows of all cases, in their order."""
    with ProcessPoolExecutor(PROCESSES) as pool:
        started = [
            [
                pool.submit(count_hits, case, seed, range(start, min(start + DRAWS_AT_ONCE, count)))
                for start in range(0, count, DRAWS_AT_ONCE)
            ]
            for case in cases
            for count in (case.count_draws(asked),)
        ]
        for case, parts in zip(cases, started, strict=True):
            draws = case.count_draws(asked)
            hits = np.sum([part.result() for part in parts], axis=0)
            for name, found in zip(case.cases, hits.tolist(), strict=True):
                yield Row(case.what, name, found / draws, draws, bound_of_draws(case, draws))


def bound_of_draws(case: Case, draws: int) -> float | None:
    """The bound, with two standard errors more where there are fewer draws than it is for."""
    bound = case.bound
    if bound is None or draws >= REFERENCE_DRAWS:
        return bound
    error = 2 * math.sqrt(bound * (1 - bound) / draws)
    return bound - error if case.what == "caught" else bound + error


def keeps_bound(row: Row) -> bool:
    """Whether a rate is within its bound: at most, or for what must be caught at least."""
    if row.bound is None:
        return True
    return row.rate >= row.bound if row.what == "caught" else row.rate <= row.bound


def main() -> int:
    """Draw all rows and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=1_000)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cases = [
        case
        for case in list_cases()
        if any(arguments.only in f"{case.what} {name}" for name in case.cases)
    ]
    rows = []
    for row in draw_rows(cases, arguments.seed, arguments.draws):
        rows.append(row)
        bound = "" if row.bound is None else f"bound {row.bound:.2%}"
        mark = "" if keeps_bound(row) else " EXCEEDED"
        line = f"{row.rate:7.2%} {row.what}: {row.case} ({row.draws:,} draws) {bound}{mark}"
        print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))
    return 0 if all(map(keeps_bound, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
