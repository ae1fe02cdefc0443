"""What a run came to: answers to prompts as lines, and of a rejection every check in a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flows.terminal.console import print_blocks, print_line
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.foreign_text import escape
from nested_core.text.value_format import format_count

if TYPE_CHECKING:
    from nested_core.records.answers import BrokenHow, SampleAnswers
    from nested_core.records.run_status import Run
    from nested_core.records.verdict import Verdict

LONGEST_TEXT = 300
ROWS_OF_EACH_KIND = 3
TITLE = "Answers to {count}, for you to read (greedy; the gate sees only whether they are broken):"


def format_sample_answers(answers: Sequence[SampleAnswers]) -> Iterator[str]:
    """A title, and for each prompt the prompt, the answers, and the data's own; all is escaped."""
    if not answers:
        return
    yield TITLE.format(count=format_count(len(answers), "prompt"))
    for row in answers:
        yield f"  {_escape_and_shorten(row.prompt)} ({row.place})"
        yield f"    base:     {_escape_and_shorten(row.base)}{_describe_damage(row.base_broken)}"
        if row.parent is not None:
            yield f"    start:    {_escape_and_shorten(row.parent)}"
        damage = _describe_damage(row.adapter_broken)
        yield f"    adapter:  {_escape_and_shorten(row.adapter)}{damage}"
        if row.expected is not None:
            yield f"    expected: {_escape_and_shorten(row.expected)}"


def _describe_damage(how: BrokenHow | None) -> str:
    from nested_core.records.answers import BROKEN_WORDS

    return "" if how is None else f" [broken: {BROKEN_WORDS[how]}]"


def _escape_and_shorten(text: str) -> str:
    shown = escape(text)
    return shown if len(shown) <= LONGEST_TEXT else f"{shown[:LONGEST_TEXT]}..."


def print_rejection(run: RunDirectory) -> None:
    """The outcome, every check as a table, then wrong answers of each suite that failed."""
    from nested_core.records.run_status import Run
    from nested_core.records.verdict_table import check_table, lost_answers

    read = Run(run)
    if read.verdict is not None:
        print_line(read.verdict.outcome)
        print_blocks(check_table(read.verdict), *lost_answers(read.verdict, read.answers))
        print_answer_tables(run)
        for note in list_notes(read.verdict, read):
            print_line(note)


def list_notes(verdict: Verdict, run: Run) -> list[str]:
    """How many warnings of each check the run's data has, in one line; then the verdict's own."""
    data = "" if run.dataset is None else run.dataset.describe_warnings()
    return [data, *verdict.notes()] if data else verdict.notes()


def print_answer_tables(run: RunDirectory) -> None:
    """What rooms show of the answers to each suite, and of rows that the verdict warns of."""
    from nested_core.records.run_status import Run
    from nested_core.report.page_blocks import show_answers, show_rows

    read = Run(run)
    for name in dict.fromkeys(answer.task for answer in read.answers):
        given = [(a.model, a.expected, a.answer, a.score) for a in read.answers if a.task == name]
        print_blocks(*show_answers(name, given))
    print_blocks(*show_rows(read, ROWS_OF_EACH_KIND))


def print_tiers(verdict: Verdict) -> None:
    """The tiers of a verdict, where not all is updated at every step."""
    from nested_core.records.verdict_table import tier_table

    if [tier.frequency for tier in verdict.tiers] != [1]:
        print_blocks(tier_table(verdict))
