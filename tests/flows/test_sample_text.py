"""Answers to prompts as a person reads them: short, and with nothing that a terminal obeys."""

from __future__ import annotations

from flows.terminal.run_results import LONGEST_TEXT, format_sample_answers
from nested_core.records.answers import SampleAnswers


def test_answers_stand_below_each_other_and_hostile_text_is_escaped() -> None:
    answers = SampleAnswers("Who?\x1b[2J", "Me", "\x07", None, "x" * 400, "valid.jsonl:3")
    lines = list(format_sample_answers([answers]))
    assert lines[0].startswith("Answers to 1 prompt, for you to read")
    assert lines[1:4] == [
        "  Who?\\x1b[2J (valid.jsonl:3)",
        "    base:     \\x07",
        f"    adapter:  {'x' * LONGEST_TEXT}...",
    ]
    assert lines[4] == "    expected: Me"


def test_an_adapter_that_training_went_on_from_has_a_line_of_its_own() -> None:
    answers = SampleAnswers("Who?", None, "a", "b", "c", "samples")
    assert "    start:    b" in format_sample_answers([answers])
    assert list(format_sample_answers([])) == []
