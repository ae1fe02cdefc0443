"""Answers against their bounds, from the files that hold them: `gate.tasks`, and sample prompts.

Nothing here needs a model: `promote` does it again and compares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from nested_core.config.sections import GateSection, TaskSection
from nested_core.errors import JUDGE_AGAIN, DamagedError, join_first_values
from nested_core.measure.losses.loss_figures import exchange_mid_p
from nested_core.records.answers import AnswerRecord, BrokenHow, SampleAnswers
from nested_core.records.comparison_family import (
    ALPHA,
    NOT_TESTED,
    Chance,
    chance_of_mean,
    find_beyond_chance,
)
from nested_core.records.loss_conclusion import Conclusion
from nested_core.records.paired_difference import (
    PairedDifference,
    compare_pairs,
    independent_clusters,
    smallest_visible_share,
    student_t_quantile,
)
from nested_core.records.verdict import Reason, SampleVerdict, TaskResult

SCORE_ROUNDING = 1e-9  # of a mean of scores
MAX_NAMED_QUESTIONS = 3
CHAMPION = "the champion"  # as a rival in messages
BADNESS: tuple[Conclusion, ...] = ("better", "no_worse", "inconclusive", "worse")

MIN_WRONG_SAME = 5  # wrong ones among equal answers: fewer may be chance
MIN_PROMPTS = 3  # fewer answers of a sound base judge nothing


def judge_answers(
    gate: GateSection, records: Sequence[AnswerRecord]
) -> tuple[tuple[TaskResult, ...], list[Reason]]:
    """The result of each suite, and the reasons `task_below` and `task_regressed`.

    Raises DamagedError if the records are not those of the configured suites.
    """
    answers_by_task = _group_answers(gate, records)
    comparisons = {
        task.name: _compare_models(task, answers_by_task[task.name]) for task in gate.tasks
    }
    family = [change for changes in comparisons.values() for change in changes.values()]
    words = dict(zip(map(id, family), conclude_answers(family), strict=True))
    results = []
    reasons: list[Reason] = []
    for task in gate.tasks:
        answers = answers_by_task[task.name]
        changes = comparisons[task.name]
        change = changes[None]
        result = _summarise_task(task, answers, change)
        failures = _task_below_reasons(task, result, change, is_paired=gate.noise == "paired")
        conclusions: list[Conclusion] = []
        for rival, against in changes.items():
            word = words[id(against)]
            if gate.noise == "none" or not against.is_tested:  # the bound alone counts
                word = against.conclude(is_worse=against.is_below_bound, is_better=word == "better")
            conclusions.append(word)
            if word == "worse":
                failures.append(_task_regressed_reason(task, result, against, rival))
        if "champion" in answers:
            rivalry = changes.get(CHAMPION, change)
            result = replace(
                result,
                champion_difference=rivalry.difference.mean,
                champion_interval=rivalry.interval,
            )
        verdict: Literal["passed", "failed"] = "failed" if failures else "passed"
        results.append(
            replace(result, verdict=verdict, conclusion=max(conclusions, key=BADNESS.index))
        )
        reasons += failures
    return tuple(results), reasons


def _compare_models(
    task: TaskSection, answers: Mapping[str, Sequence[AnswerRecord]]
) -> dict[str | None, ScoreChange]:
    """The change from what training began from, under None, and from the champion.

    A champion that answers as the parent, which it often is, is no second rival.
    """
    before = answers.get("parent", answers["base"])
    changes: dict[str | None, ScoreChange] = {
        None: ScoreChange.compare(before, answers["candidate"], task.max_drop)
    }
    champion = answers.get("champion")
    if champion is not None and [r.score for r in champion] != [r.score for r in before]:
        changes[CHAMPION] = ScoreChange.compare(champion, answers["candidate"], task.max_drop)
    return changes


def conclude_answers(family: Sequence[ScoreChange]) -> list[Conclusion]:
    """The word for each change of a family: those of all suites and rivals that are compared.

    However many there are, an adapter that answers as well is told as worse at any of them in at
    most 2.5 % of cases, and as better in at most 2.5 %.
    """
    falls = find_beyond_chance([own.fall for own in family])
    rises = find_beyond_chance([own.rise for own in family])
    return [
        own.conclude(is_worse=is_fall, is_better=is_rise)
        for own, is_fall, is_rise in zip(family, falls, rises, strict=True)
    ]


@dataclass(frozen=True)
class ScoreChange:
    """The paired difference of two models' scores, and the questions that the second one lost.

    fall, rise: the chance of so large a fall, or rise, where nothing changed: exact McNemar's test,
        mid-p, for right and wrong answers; Student's t where the interval leaves out 0, else one
        half, for shares and for questions that share a prompt. A rise needs an interval above 0
        too, and its chance is multiplied by the number of steps that these questions chose among.
    max_drop: the fall that is allowed; None allows any.
    chosen_among: the steps that these questions chose among.
    """

    difference: PairedDifference
    lost: tuple[str, ...]
    fall: Chance
    rise: Chance
    max_drop: float | None
    chosen_among: int = 1

    @classmethod
    def compare(
        cls,
        before: Sequence[AnswerRecord],
        after: Sequence[AnswerRecord],
        max_drop: float | None = 0.0,
    ) -> ScoreChange:
        """From the answers of two models to the same questions, in the same order."""
        scores = np.array([[record.score for record in own] for own in (before, after)])
        clusters = independent_clusters(
            np.array([r.line if r.same_prompt_as is None else r.same_prompt_as for r in after])
        )
        difference = compare_pairs(scores[0], scores[1], clusters=clusters)
        among = max((r.chosen_among for r in after), default=1)
        difference = _count_choice(difference, among)
        pairs = zip(before, after, strict=True)
        lost = tuple(earlier.question for earlier, later in pairs if later.score < earlier.score)
        fall, rise = _chances(difference)
        if clusters is None and np.isin(scores, (0.0, 1.0)).all():
            won = int((scores[1] > scores[0]).sum())
            fall, rise = _exact_chances(len(lost), won)
        rise = Chance(min(1.0, rise.p_value * among), min(1.0, rise.smallest * among))
        if not difference.is_above(0):
            rise = replace(rise, p_value=max(0.5, rise.p_value))
        if not difference.is_measurable:
            fall = rise = NOT_TESTED
        elif max_drop is None:
            fall = NOT_TESTED
        return cls(difference, lost, fall, rise, max_drop, among)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the 95 % interval; None with too few questions for one."""
        difference = self.difference
        return (difference.low, difference.high) if difference.is_measurable else None

    @property
    def is_tested(self) -> bool:
        """Whether it is a question of chance: there is a bound, and there are enough questions."""
        return self.max_drop is not None and self.difference.is_measurable

    @property
    def is_below_bound(self) -> bool:
        """Whether more than `max_drop` was lost, by chance or not."""
        return self.max_drop is not None and self.is_below(-self.max_drop)

    def is_below(self, bound: float) -> bool:
        """Whether the mean difference is less than `bound`, beyond rounding."""
        return self.difference.mean < bound - SCORE_ROUNDING

    @property
    def is_within_bound(self) -> bool:
        """Whether the fall is shown to be within a `max_drop` above 0."""
        return bool(self.max_drop) and self.difference.one_sided_low >= -(self.max_drop or 0.0)

    def conclude(self, *, is_worse: bool, is_better: bool) -> Conclusion:
        """The word for it; without a margin `no_worse` needs as many answers won as lost.

        Of a step that these questions chose it needs a margin: the best of many steps wins as many
        by luck. A fall within `max_drop` is not worse.
        """
        if is_worse and not self.is_within_bound:
            return "worse"
        if is_better:
            return "better"
        is_shown = self.chosen_among == 1 and not self.is_below(0.0)
        if self.max_drop:
            is_shown = self.is_within_bound
        return "no_worse" if is_shown else "inconclusive"


def _count_choice(difference: PairedDifference, among: int) -> PairedDifference:
    """The difference of the best of `among` steps: its lower ends are as far as luck may take it.

    The 5 % are divided by their number, as where no losses of single steps are at hand.
    """
    if among == 1 or not difference.is_measurable:
        return difference
    quantile = student_t_quantile(1 - ALPHA / among, difference.examples - 1)
    low = difference.mean - quantile * difference.standard_error
    one_sided_low = min(difference.one_sided_low, low)
    return replace(difference, low=min(difference.low, low), one_sided_low=one_sided_low)


def _chances(difference: PairedDifference) -> tuple[Chance, Chance]:
    """Of the fall and of the rise, from the mean, its standard error and the interval."""
    size, error = abs(difference.mean), difference.standard_error
    fall = rise = Chance(0.5)
    if difference.is_below(0):
        fall = Chance(chance_of_mean(size, error, difference.examples))
    if difference.is_above(0):
        rise = Chance(chance_of_mean(size, error, difference.examples))
    return fall, rise


def _exact_chances(lost: int, won: int) -> tuple[Chance, Chance]:
    """Of the fall and of the rise, where so many right answers were lost and won."""
    smallest = exchange_mid_p(lost + won, 0)
    return (
        Chance(exchange_mid_p(lost, won), smallest),
        Chance(exchange_mid_p(won, lost), smallest),
    )


def _group_answers(
    gate: GateSection, records: Sequence[AnswerRecord]
) -> dict[str, dict[str, list[AnswerRecord]]]:
    """The answers of each model to each suite, in the order of the questions."""
    grouped: dict[str, dict[str, list[AnswerRecord]]] = {task.name: {} for task in gate.tasks}
    for record in records:
        if record.task in grouped:
            grouped[record.task].setdefault(record.model, []).append(record)
    for name, answers in grouped.items():
        lines = {tuple(record.line for record in given) for given in answers.values()}
        if len(lines) != 1 or not {"base", "candidate"} <= answers.keys():
            raise DamagedError(
                f"gate.tasks: the answers to {name} are not all there.", advice=JUDGE_AGAIN
            )
    return grouped


def _summarise_task(
    task: TaskSection, answers: Mapping[str, Sequence[AnswerRecord]], change: ScoreChange
) -> TaskResult:
    difference = change.difference
    shares = {
        model: sum(record.score for record in given) / len(given)
        for model, given in answers.items()
    }
    candidate = answers["candidate"]
    return TaskResult(
        name=task.name,
        questions=len(candidate),
        base=shares["base"],
        parent=shares.get("parent"),
        champion=shares.get("champion"),
        candidate=shares["candidate"],
        difference=difference.mean,
        interval=(difference.low, difference.high) if difference.is_measurable else None,
        smallest_visible=smallest_visible_share(len(candidate)),
        verdict="passed",
        seconds={model: sum(r.seconds for r in given) for model, given in answers.items()},
        odd={
            "empty": sum(record.empty for record in candidate),
            "endless": sum(record.endless for record in candidate),
            "repeated": sum(record.repeated for record in candidate),
        },
        lost=len(change.lost),
        lost_first=change.lost[:MAX_NAMED_QUESTIONS],
        chosen_among=candidate[0].chosen_among,
        same_answer=_find_same_answer(candidate),
    )


def _find_same_answer(answers: Sequence[AnswerRecord]) -> str | None:
    """The answer to every question, where it is wrong for MIN_WRONG_SAME of them or more."""
    texts = {record.answer.strip() for record in answers}
    wrong = sum(record.score == 0 for record in answers)
    return next(iter(texts)) if len(texts) == 1 and wrong >= MIN_WRONG_SAME else None


def _task_below_reasons(
    task: TaskSection, result: TaskResult, change: ScoreChange, *, is_paired: bool
) -> list[Reason]:
    # With too few questions for an interval the bound alone counts, as with losses.
    is_measurable = is_paired and change.difference.is_measurable
    is_chance = is_measurable and not change.difference.is_above(0)
    problems = []
    if task.min is not None and result.candidate < task.min - SCORE_ROUNDING:
        problems.append(f"its min is {task.min:g}")
    if task.min_gain is not None:
        if result.difference < task.min_gain - SCORE_ROUNDING:
            problems.append(f"its min_gain is {task.min_gain:g}")
        elif task.min_gain > 0 and is_chance:
            problems.append("its min_gain is reached, and may be chance")
    return [
        Reason("task_below", f"{result.describe()}; {problem}", suite=task.name)
        for problem in problems
    ]


def _task_regressed_reason(
    task: TaskSection, result: TaskResult, change: ScoreChange, rival: str | None
) -> Reason:
    """The reason for a fall beyond `max_drop` and beyond chance; `rival` names who answered more.

    Nobody is named for the adapter that training began from.
    """
    named = join_first_values(change.lost, MAX_NAMED_QUESTIONS)
    against = "" if rival is None else f" against {rival}"
    message = (
        f"{result.describe()}; its max_drop{against} is {task.max_drop:g}; "
        f"{len(change.lost)} lost: {named}"
    )
    return Reason("task_regressed", message, suite=task.name)


def is_sound(damage: BrokenHow | None) -> bool:
    """Whether a base's answer lets its prompt judge: an answer that is merely long does."""
    return damage not in ("empty", "no_words", "repeated")


def judge_samples(rows: Sequence[SampleAnswers]) -> SampleVerdict:
    """Count the answers that training broke, over the prompts to which the base's answer is sound.

    An endless answer is counted only if the base's own came to an end.
    """
    judged = [row for row in rows if is_sound(row.base_broken)]
    if len(judged) < MIN_PROMPTS:
        return SampleVerdict(asked=len(rows))
    ways = Counter(
        row.adapter_broken
        for row in judged
        if row.adapter_broken is not None
        and not (row.adapter_broken == "endless" and row.base_broken == "endless")
    )
    return SampleVerdict(
        asked=len(rows),
        judged=len(judged),
        broken=sum(ways.values()),
        ways={str(way): count for way, count in sorted(ways.items())},
    )
