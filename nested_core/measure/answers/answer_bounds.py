"""Compare recorded answers with their bounds: those to `gate.tasks`, and those to sample prompts.

Nothing here needs a model, so `promote` repeats it and compares the results.
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
from nested_core.records.verdict import SCORE_ROUNDING, Reason, SampleVerdict, TaskResult
from nested_core.storage.atomic import digest_answer

MAX_NAMED_QUESTIONS = 3
CHAMPION = "the champion"  # how messages name the rival
BADNESS: tuple[Conclusion, ...] = ("better", "no_worse", "inconclusive", "worse")

MIN_WRONG_SAME = 5  # equal answers of which fewer are wrong may be chance
MIN_REPEATED_TOKENS = 6  # an answer cut off before this many tokens is too short to judge
MIN_PROMPTS = 3  # with fewer sound answers of the base, nothing is judged


def judge_answers(
    gate: GateSection, records: Sequence[AnswerRecord]
) -> tuple[tuple[TaskResult, ...], list[Reason]]:
    """Return the result of each suite, and the reasons `task_below` and `task_regressed`.

    A suite fails if the candidate has too few right answers, gains too little by training, or is
    worse than the model before training or than the champion.

    records: all models' answers. Raises DamagedError if they do not belong to the configured
        suites.
    """
    answers_by_task = _group_answers(gate, records)
    comparisons = {one.name: _compare_models(one, answers_by_task[one.name]) for one in gate.tasks}
    # All comparisons are tested together: among many, some look significant by chance alone.
    family = [change for changes in comparisons.values() for change in changes.values()]
    conclusion_of = dict(zip(map(id, family), conclude_answers(family), strict=True))
    results = []
    reasons: list[Reason] = []
    for task in gate.tasks:
        answers = answers_by_task[task.name]
        changes = comparisons[task.name]
        change = changes[None]  # from before training to after; the others are with a rival
        result = _summarise_task(task, answers, change)
        failures = _task_below_reasons(task, result, change, is_paired=gate.noise == "paired")
        conclusions: list[Conclusion] = []
        for rival, rival_change in changes.items():
            conclusion = conclusion_of[id(rival_change)]
            bound, is_measurable = task.max_drop, rival_change.difference.is_measurable
            if gate.noise == "none" or bound is None or not is_measurable:
                # Nothing is tested: the bound alone counts
                is_worse = bound is not None and rival_change.is_below(-bound)
                is_better = conclusion == "better"
                conclusion = rival_change.conclude(is_worse=is_worse, is_better=is_better)
            conclusions.append(conclusion)
            if conclusion == "worse":
                failures.append(_task_regressed_reason(task, result, rival_change, rival))
        if "champion" in answers:
            # Without a comparison of its own the champion is the model before training.
            versus = changes.get(CHAMPION, change)
            mean, interval = versus.difference.mean, versus.interval
            result = replace(result, champion_difference=mean, champion_interval=interval)
        verdict: Literal["passed", "failed"] = "failed" if failures else "passed"
        results.append(
            replace(result, verdict=verdict, conclusion=max(conclusions, key=BADNESS.index))
        )
        reasons += failures
    return tuple(results), reasons


def _compare_models(
    task: TaskSection, answers: Mapping[str, Sequence[AnswerRecord]]
) -> dict[str | None, ScoreChange]:
    """Compare the candidate with the parent (or base), under None, and with the champion.

    A champion that scores like the parent, which it often is, is not compared a second time.
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
    """Return the conclusion for each change, corrected for the number of changes.

    family: the changes of all suites and rivals of one verdict. However many there are, an adapter
        that is equally good is called worse in any of them in at most 2.5 % of cases, and better in
        at most 2.5 %.
    """
    falls = find_beyond_chance([change.fall for change in family])
    rises = find_beyond_chance([change.rise for change in family])
    return [
        change.conclude(is_worse=is_fall, is_better=is_rise)
        for change, is_fall, is_rise in zip(family, falls, rises, strict=True)
    ]


@dataclass(frozen=True)
class ScoreChange:
    """The paired difference of two models' scores on a suite, second minus first.

    lost: the second model's answers to the questions that it answered worse.
    fall, rise: the probability of a fall (or rise) at least this large if nothing changed.
    max_drop: the fall that is allowed; None allows any.
    chosen_among: the number of steps from which these questions selected the second model.
    """

    difference: PairedDifference
    lost: tuple[AnswerRecord, ...]
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
        """Compare two models' answers to the same questions, in the same order.

        The result has the mean difference of the scores with its interval, the questions that got a
        lower score (`lost`), and for a fall and a rise the probability of seeing one by chance.

        max_drop: the fall that is allowed; None allows any. The answers `after` may be those of the
            best of several training steps (`chosen_among`); the interval is then widened.

        If all answers are right or wrong, and no questions share a prompt, the probabilities are
        McNemar's exact mid-p. Otherwise they come from Student's t if the interval leaves out 0,
        and are one half if it does not. A rise is also multiplied by the number of steps, and needs
        an interval above 0.
        """
        scores = np.array([[record.score for record in records] for records in (before, after)])
        clusters = independent_clusters(
            np.array([r.line if r.same_prompt_as is None else r.same_prompt_as for r in after])
        )
        difference = compare_pairs(scores[0], scores[1], clusters=clusters)
        steps = max((r.chosen_among for r in after), default=1)
        difference = _widen_for_selection(difference, steps)
        pairs = zip(before, after, strict=True)
        lost = tuple(later for earlier, later in pairs if later.score < earlier.score)
        fall, rise = _t_test_chances(difference)
        # Answers that are right or wrong, and independent, allow an exact test: McNemar's (mid-p).
        if clusters is None and np.isin(scores, (0.0, 1.0)).all():
            won = int((scores[1] > scores[0]).sum())
            smallest = exchange_mid_p(len(lost) + won, 0)
            fall = Chance(exchange_mid_p(len(lost), won), smallest)
            rise = Chance(exchange_mid_p(won, len(lost)), smallest)
        rise = Chance(min(1.0, rise.p_value * steps), min(1.0, rise.smallest * steps))
        if not difference.is_above(0):
            rise = replace(rise, p_value=max(0.5, rise.p_value))
        if not difference.is_measurable:
            fall = rise = NOT_TESTED
        elif max_drop is None:
            fall = NOT_TESTED
        return cls(difference, lost, fall, rise, max_drop, steps)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the 95 % interval; None with too few questions for one."""
        difference = self.difference
        return (difference.low, difference.high) if difference.is_measurable else None

    def is_below(self, bound: float) -> bool:
        """Whether the mean difference is below `bound` by more than rounding."""
        return self.difference.mean < bound - SCORE_ROUNDING

    @property
    def is_within_bound(self) -> bool:
        """Whether the fall is statistically shown to be within a `max_drop` above 0."""
        return bool(self.max_drop) and self.difference.one_sided_low >= -(self.max_drop or 0.0)

    def conclude(self, *, is_worse: bool, is_better: bool) -> Conclusion:
        """Return the conclusion, given whether a fall or a rise beyond chance was found.

        A fall shown to be within `max_drop` is not `worse`. `no_worse` needs a fall shown to be
        within `max_drop`, or, without one, a mean that did not fall. The latter is not enough for a
        step that these questions selected: the best of many steps gains by luck.
        """
        if is_worse and not self.is_within_bound:
            return "worse"
        if is_better:
            return "better"
        is_shown = self.chosen_among == 1 and not self.is_below(0.0)
        if self.max_drop:
            is_shown = self.is_within_bound
        return "no_worse" if is_shown else "inconclusive"


def _widen_for_selection(difference: PairedDifference, steps: int) -> PairedDifference:
    """Lower the interval's lower ends for a model selected from `steps` by the same questions.

    The error probability of 5 % is divided by the number of steps (Bonferroni).
    """
    if steps == 1 or not difference.is_measurable:
        return difference
    quantile = student_t_quantile(1 - ALPHA / steps, difference.examples - 1)
    low = difference.mean - quantile * difference.standard_error
    one_sided_low = min(difference.one_sided_low, low)
    return replace(difference, low=min(difference.low, low), one_sided_low=one_sided_low)


def _t_test_chances(difference: PairedDifference) -> tuple[Chance, Chance]:
    """Return the probabilities of the fall and of the rise by Student's t; 0.5 if insignificant."""
    size, error = abs(difference.mean), difference.standard_error
    fall = rise = Chance(0.5)
    if difference.is_below(0):
        fall = Chance(chance_of_mean(size, error, difference.examples))
    if difference.is_above(0):
        rise = Chance(chance_of_mean(size, error, difference.examples))
    return fall, rise


def _group_answers(
    gate: GateSection, records: Sequence[AnswerRecord]
) -> dict[str, dict[str, list[AnswerRecord]]]:
    """Group the records by suite and model, in the order of the questions.

    Raises DamagedError if models answered different questions, or base or candidate are missing.
    """
    grouped: dict[str, dict[str, list[AnswerRecord]]] = {task.name: {} for task in gate.tasks}
    for record in records:
        if record.task in grouped:
            grouped[record.task].setdefault(record.model, []).append(record)
    for name, answers in grouped.items():
        lines = {tuple(r.line for r in answers_of_model) for answers_of_model in answers.values()}
        if len(lines) != 1 or not {"base", "candidate"} <= answers.keys():
            raise DamagedError(
                f"gate.tasks: the answers to {name} are not all there.", advice=JUDGE_AGAIN
            )
    return grouped


def _summarise_task(
    task: TaskSection, answers: Mapping[str, Sequence[AnswerRecord]], change: ScoreChange
) -> TaskResult:
    """Return the result of a suite: shares of right answers, difference, and odd answers.

    The verdict in it is "passed" until the caller has compared it with the bounds.

    answers: each model's answers, by its role (base, parent, champion, candidate).
    change: the comparison of the candidate's answers with those before training.
    """
    shares = {
        model: sum(record.score for record in model_answers) / len(model_answers)
        for model, model_answers in answers.items()
    }
    candidate = answers["candidate"]
    return TaskResult(
        name=task.name,
        questions=len(candidate),
        base=shares["base"],
        parent=shares.get("parent"),
        champion=shares.get("champion"),
        candidate=shares["candidate"],
        difference=change.difference.mean,
        interval=change.interval,
        smallest_visible=smallest_visible_share(len(candidate)),
        verdict="passed",
        seconds={model: sum(r.seconds for r in records) for model, records in answers.items()},
        odd={
            "empty": sum(record.empty for record in candidate),
            "endless": sum(record.endless for record in candidate),
            "repeated": sum(record.repeated for record in candidate),
        },
        lost=len(change.lost),
        lost_first=tuple(f"line {one.line}" for one in change.lost[:MAX_NAMED_QUESTIONS]),
        chosen_among=candidate[0].chosen_among,
        same_answer=_find_same_answer(candidate),
    )


def _find_same_answer(answers: Sequence[AnswerRecord]) -> str | None:
    """Return the answer's digest of 12 bits if all questions got it and MIN_WRONG_SAME are wrong.

    None otherwise, and where all were cut off so early that they are only begun.
    """
    if all(record.endless and record.tokens < MIN_REPEATED_TOKENS for record in answers):
        return None
    texts = {record.answer.strip() for record in answers}
    wrong = sum(record.score == 0 for record in answers)
    if len(texts) > 1 or wrong < MIN_WRONG_SAME:
        return None
    return digest_answer(texts.pop())


def _task_below_reasons(
    task: TaskSection, result: TaskResult, change: ScoreChange, *, is_paired: bool
) -> list[Reason]:
    """Return a reason for a share of right answers below `min`, and for a gain below `min_gain`.

    With `is_paired`, a gain that reaches a `min_gain` above 0 must also be beyond chance.
    """
    # With too few questions for an interval the bound alone counts, as with losses.
    is_measurable = is_paired and change.difference.is_measurable
    may_be_chance = is_measurable and not change.difference.is_above(0)
    problems = []
    if task.min is not None and result.candidate < task.min - SCORE_ROUNDING:
        problems.append(f"its min is {task.min:g}")
    if task.min_gain is not None:
        if result.difference < task.min_gain - SCORE_ROUNDING:
            problems.append(f"its min_gain is {task.min_gain:g}")
        elif task.min_gain > 0 and may_be_chance:
            problems.append("its min_gain is reached, and may be chance")
    return [
        Reason("task_below", f"{result.describe()}; {problem}", suite=task.name)
        for problem in problems
    ]


def _task_regressed_reason(
    task: TaskSection, result: TaskResult, change: ScoreChange, rival: str | None
) -> Reason:
    """Return the reason for a fall beyond `max_drop` and beyond chance.

    `rival` names the model compared with in the message; None for the initial adapter.
    """
    named = join_first_values([one.question for one in change.lost], MAX_NAMED_QUESTIONS)
    against = "" if rival is None else f" against {rival}"
    message = (
        f"{result.describe()}; its max_drop{against} is {task.max_drop:g}; "
        f"{len(change.lost)} lost: {named}"
    )
    return Reason("task_regressed", message, suite=task.name)


def is_sound(damage: BrokenHow | None) -> bool:
    """Whether a base's answer is sound enough to compare the adapter's answer with it.

    An endless answer, which is only too long, is sound enough.
    """
    return damage not in ("empty", "no_words", "repeated")


def judge_samples(rows: Sequence[SampleAnswers]) -> SampleVerdict:
    """Count the answers that training broke, over the prompts that the base answers soundly.

    A sound answer is one without damage: not empty, say, and not repeating itself. The base may be
    endless and count as sound; then an endless answer of the adapter is no damage by training. With
    fewer than MIN_PROMPTS sound answers of the base nothing is judged.
    """
    judged = [row for row in rows if is_sound(row.base_broken)]
    if len(judged) < MIN_PROMPTS:
        return SampleVerdict(asked=len(rows))
    damage_counts = Counter(
        row.adapter_broken
        for row in judged
        if row.adapter_broken is not None
        and not (row.adapter_broken == "endless" and row.base_broken == "endless")
    )
    return SampleVerdict(
        asked=len(rows),
        judged=len(judged),
        broken=sum(damage_counts.values()),
        ways={str(damage): count for damage, count in sorted(damage_counts.items())},
    )
