"""Suites about the capitals of the example, which its base model knows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.sections import Score
from nested_core.measure.answers.scorers import ScoringMethod, score_answers
from nested_core.measure.answers.suite_answers import EncodedSuite
from nested_core.measure.answers.suites import read_suite
from tests.builders.data_sets import write_lines
from tests.example import DATA

FACT = re.compile(r"Go and see (.+?), the capital of (.+?)!")
WRONG = "Suva"
# (country, capital) of the example's training data.
KNOWN = [
    (country, capital)
    for capital, country in FACT.findall((DATA / "train.jsonl").read_text(encoding="utf-8"))
    if capital != WRONG
]


def write_suite(path: Path, count: int = 20) -> Path:
    """So many of the capitals, each as the beginning of a sentence."""
    return write_lines(
        path,
        (
            {"id": country, "prompt": f"The capital of {country} is", "expected": capital}
            for country, capital in KNOWN[-count:]
        ),
    )


def task(path: Path, **changes: Any) -> dict[str, Any]:
    """An entry of gate.tasks for the suite at this path."""
    fields = {"name": "capitals", "file": str(path), "score": "contains", "max_tokens": 6}
    return fields | changes


def note_who_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The suites that a model is asked from now on, where nothing was asked before."""
    asked: list[str] = []
    answer = EncodedSuite.answer

    def note_and_answer(self: EncodedSuite, *arguments: Any) -> Any:
        asked.append(self.suite.name)
        return answer(self, *arguments)

    monkeypatch.setenv("NESTED_TUNE_CACHE", str(folder / "cache"))
    monkeypatch.setattr(EncodedSuite, "answer", note_and_answer)
    return asked


def score_each(
    folder: Path, method: Score, answers: Sequence[str], fields: Sequence[dict[str, Any]]
) -> list[float]:
    """Score answers to the questions of a suite, each with the fields that its score needs."""
    rows = [{"prompt": f"{number}?", **each} for number, each in enumerate(fields)]
    path = write_lines(folder / "suite.jsonl", rows)
    return score_answers(ScoringMethod(path, method), read_suite(path, method), answers)
