"""The scores of `gate.tasks` against their bounds, from the answers that answers.jsonl holds.

Nothing here needs a model: `promote` does it again and compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nested_core.config.gate import GateSection, TaskSection
from nested_core.errors import DamagedError, join_first_values
from nested_core.gate.answers.answer_records import AnswerRecord, read_answers
from nested_core.gate.paired_difference import (
    PairedDifference,
    compare_pairs,
    smallest_visible_share,
)
from nested_core.gate.recorded_verdict import is_close_figure
from nested_core.gate.verdict import Reason, TaskResult
from nested_core.storage.manifest import FileEntry, describe_file
from nested_core.storage.run_directory import RunDirectory

SCORE_ROUNDING = 1e-9  # of a mean of scores
MAX_NAMED_QUESTIONS = 3


def judge_answers(
    gate: GateSection, records: Sequence[AnswerRecord]
) -> tuple[tuple[TaskResult, ...], list[Reason]]:
    """The result of each suite, and the reasons `task_below` and `task_regressed`.

    Raises DamagedError if the records are not those of the configured suites.
    """
    results = []
    reasons: list[Reason] = []
    for task in gate.tasks:
        answers = _answers_of_task(task, records)
        change = ScoreChange.compare(answers.get("parent", answers["base"]), answers["candidate"])
        result = _summarise_task(task, answers, change.difference)
        is_paired = gate.noise == "paired"
        failures = _task_below_reasons(task, result, change, is_paired=is_paired)
        failures += _task_regressed_reasons(task, result, change, is_paired=is_paired)
        if "champion" in answers:
            rivalry = ScoreChange.compare(answers["champion"], answers["candidate"])
            result = replace(
                result,
                champion_difference=rivalry.difference.mean,
                champion_interval=rivalry.interval,
            )
            # A champion that answers as the parent, which it often is, is no second reason.
            if rivalry != change:
                failures += _task_regressed_reasons(
                    task, result, rivalry, is_paired=is_paired, rival="the champion"
                )
        results.append(replace(result, verdict="failed") if failures else result)
        reasons += failures
    return tuple(results), reasons


@dataclass(frozen=True)
class ScoreChange:
    """The paired difference of two models' scores, and the questions that the second one lost."""

    difference: PairedDifference
    lost: tuple[str, ...]

    @classmethod
    def compare(cls, before: Sequence[AnswerRecord], after: Sequence[AnswerRecord]) -> ScoreChange:
        """From the answers of two models to the same questions, in the same order."""
        difference = compare_pairs(
            [record.score for record in before], [record.score for record in after]
        )
        pairs = zip(before, after, strict=True)
        lost = tuple(earlier.question for earlier, later in pairs if later.score < earlier.score)
        return cls(difference, lost)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the 95 % interval; None with too few questions for one."""
        difference = self.difference
        return (difference.low, difference.high) if difference.is_measurable else None


def _answers_of_task(
    task: TaskSection, records: Sequence[AnswerRecord]
) -> dict[str, list[AnswerRecord]]:
    """The answers of each model, in the order of the questions."""
    answers: dict[str, list[AnswerRecord]] = {}
    for record in records:
        if record.task == task.name:
            answers.setdefault(record.model, []).append(record)
    lines = {tuple(record.line for record in given) for given in answers.values()}
    if len(lines) != 1 or not {"base", "candidate"} <= answers.keys():
        raise DamagedError(
            f"gate.tasks: the answers to {task.name} are not all there. Judge the run again with "
            f"--resume."
        )
    return answers


def _summarise_task(
    task: TaskSection, answers: Mapping[str, Sequence[AnswerRecord]], difference: PairedDifference
) -> TaskResult:
    shares = {model: _mean_score(given) for model, given in answers.items()}
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
    )


def _mean_score(records: Sequence[AnswerRecord]) -> float:
    return sum(record.score for record in records) / len(records)


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
    return [Reason("task_below", f"{result.describe()}; {problem}") for problem in problems]


def _task_regressed_reasons(
    task: TaskSection,
    result: TaskResult,
    change: ScoreChange,
    *,
    is_paired: bool,
    rival: str | None = None,
) -> list[Reason]:
    """The reason for a drop beyond `max_drop` and beyond chance; `rival` names who answered more.

    Nobody is named for the adapter that training began from.
    """
    difference = change.difference
    if task.max_drop is None or difference.mean >= -task.max_drop - SCORE_ROUNDING:
        return []
    if is_paired and difference.is_measurable and not difference.is_below(0):
        return []
    named = join_first_values(change.lost, MAX_NAMED_QUESTIONS)
    against = "" if rival is None else f" against {rival}"
    message = (
        f"{result.describe()}; its max_drop{against} is {task.max_drop:g}; "
        f"{len(change.lost)} lost: {named}"
    )
    return [Reason("task_regressed", message)]


def task_file_entries(gate: GateSection, run: RunDirectory) -> dict[str, FileEntry]:
    """The entries for the manifest of what the results rest on; none without suites."""
    paths = (run.suites, run.answers) if gate.tasks else ()
    return {path.name: describe_file(path) for path in paths}


def require_same_task_results(
    gate: GateSection, run: RunDirectory, recorded: Mapping[str, Any]
) -> None:
    """Raise DamagedError unless the recorded answers give the recorded results, and no reason."""
    results, reasons = judge_answers(gate, read_answers(run.answers)) if gate.tasks else ((), [])
    expected = [asdict(result) for result in results]
    if reasons or not _are_same_rows(recorded.get("tasks", []), expected):
        raise DamagedError(
            f"{run.gate} is not the verdict on {run.answers.name} beside it: tasks differ. Judge "
            f"the run again with --resume."
        )


def _are_same_rows(recorded: Any, expected: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows are the expected ones, within rounding; an earlier release left out nulls."""
    if not isinstance(recorded, list) or len(recorded) != len(expected):
        return False
    return all(
        isinstance(row, dict) and is_close_figure(dict.fromkeys(now) | row, now)
        for row, now in zip(recorded, expected, strict=True)
    )
