"""What a run came to: answers to prompts as lines, and of a rejection every check in a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flows.terminal.console import print_table
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.foreign_text import escape

if TYPE_CHECKING:
    from nested_core.records.answers import BrokenHow, SampleAnswers
    from nested_core.records.verdict import Verdict

LONGEST_TEXT = 300
TITLE = "Answers to {count}, for you to read (greedy; the gate sees only whether they are broken):"


def format_sample_answers(answers: Sequence[SampleAnswers]) -> Iterator[str]:
    """A title, and for each prompt the prompt, the answers, and the data's own; all is escaped."""
    if not answers:
        return
    noun = "prompt" if len(answers) == 1 else "prompts"
    yield TITLE.format(count=f"{len(answers)} {noun}")
    for row in answers:
        yield f"  {_escape_and_shorten(row.prompt)} ({row.place})"
        yield f"    base:     {_escape_and_shorten(row.base)}{_describe_damage(row.base_broken)}"
        if row.parent is not None:
            yield f"    parent:   {_escape_and_shorten(row.parent)}"
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
    """The checks of the run's verdict as a table, then wrong answers of each suite that failed."""
    from nested_core.gate.verdict_table import (
        CHECK_COLUMNS,
        LOST_COLUMNS,
        list_checks,
        lost_answers,
    )
    from nested_core.records.run import Run

    read = Run(run)
    if read.verdict is None:
        return
    print_table(CHECK_COLUMNS, [check.cells for check in list_checks(read.verdict)])
    for suite, rows in lost_answers(read.verdict, read.answers):
        print_table(LOST_COLUMNS, rows, title=f"{suite}: some of the questions that it failed")


def print_tiers(verdict: Verdict) -> None:
    """The tier table of a verdict: frequencies, updates expected and applied, change.

    None where all is updated at every step.
    """
    if [tier.frequency for tier in verdict.tiers] == [1]:
        return
    rows = []
    for tier in verdict.tiers:
        own = [t.relative_delta for t in verdict.tensors if t.tier == tier.tier]
        deltas = [delta for delta in own if delta is not None]
        change = f"{sum(deltas) / len(deltas):.3f}" if deltas else "-"
        changed = f"{tier.changed} of {tier.tensors}"
        counts = (tier.expected_updates, tier.applied_updates, tier.skipped_updates)
        rows.append((tier.tier, f"every {tier.frequency}", changed, *counts, change))
    columns = ("tier", "updated", "tensors changed", "expected", "applied", "skipped", "change")
    judged = f"step {verdict.adapter_step}, whose adapter was judged"
    print_table(columns, rows, title=f"Tiers up to {judged} (change: mean relative)")
