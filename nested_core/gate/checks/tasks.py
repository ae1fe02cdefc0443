"""The check of the answers to the suites of `gate.tasks`."""

from __future__ import annotations

from dataclasses import replace

from nested_core.gate.champion_adapter import UnusableChampion
from nested_core.gate.checks.base import WITHOUT_MODEL
from nested_core.gate.checks.losses import LOSSES
from nested_core.gate.checks.tensors import CHANGE, EFFECT
from nested_core.gate.judged import Check, JudgedRun
from nested_core.gate.task_answers import answer_tasks
from nested_core.gate.task_bounds import judge_answers
from nested_core.records.verdict import Reason


def _find_worse_answers(judged: JudgedRun) -> list[Reason]:
    rival = None if isinstance(judged.champion, UnusableChampion) else judged.champion
    answers = answer_tasks(judged.base, judged.run, judged.evidence, rival)
    results, reasons = judge_answers(judged.bounds, answers)
    judged.answers = answers
    judged.verdict = replace(judged.verdict, tasks=results)
    return reasons


TASKS = Check(
    "answers",
    _find_worse_answers,
    stopped_by=(*WITHOUT_MODEL, CHANGE, EFFECT, LOSSES),
    is_asked=lambda bounds: bool(bounds.tasks),
    bounds=("tasks",),
    stage="answers to gate.tasks",
)
