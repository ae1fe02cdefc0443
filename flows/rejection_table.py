"""What a person sees of a rejection: every check with its figures, and answers that were lost."""

from __future__ import annotations

from flows.terminal import print_table
from nested_core.storage.run_directory import RunDirectory


def print_rejection(run: RunDirectory) -> None:
    """The checks of the run's verdict as a table, then wrong answers of each suite that failed."""
    from nested_core.gate.answers.answer_records import read_answers
    from nested_core.gate.verdict import read_verdict
    from nested_core.gate.verdict_table import (
        CHECK_COLUMNS,
        LOST_COLUMNS,
        list_checks,
        lost_answers,
    )

    verdict = read_verdict(run.gate)
    print_table(CHECK_COLUMNS, [check.cells for check in list_checks(verdict)])
    if not verdict.tasks:
        return
    for suite, rows in lost_answers(verdict, read_answers(run.answers)):
        print_table(LOST_COLUMNS, rows, title=f"{suite}: some of the questions that it failed")
