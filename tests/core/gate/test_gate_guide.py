"""Every reason and bound of the gate has a place in docs/gate.md, which messages name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from nested_core.config.sections import GateSection, Score, TaskSection
from nested_core.measure.answers.scorers import SCORES_OF_SUITES, ScoringMethod
from nested_core.measure.answers.suite_answers import Suite
from nested_core.records.verdict import GATE_GUIDE, Code, Reason
from nested_core.seams import is_there
from tests.core.gate.pairs import fresh_tensors, judge_pair

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / GATE_GUIDE).read_text(encoding="utf-8")
ANCHORS = re.findall(r'^### (\w+)$|<a id="(\w+)">', TEXT, re.MULTILINE)
BOUNDS = {
    *(name for name in GateSection.model_fields if name not in ("tasks", "drift")),
    *("min", "max_drop", "min_gain"),
} - {"allow_python_scorers"}


@pytest.mark.parametrize("code", get_args(Code))
def test_every_reason_has_an_anchor_that_its_message_ends_with(code: Code) -> None:
    assert [heading for heading, _ in ANCHORS].count(code) == 1
    assert Reason(code, "why").with_guide().message == f"why; docs/gate.md#{code}"


def test_every_bound_has_an_anchor() -> None:
    assert {name for _, name in ANCHORS} >= BOUNDS
    assert {"min", "max_drop", "min_gain"} <= set(TaskSection.model_fields)


def test_a_verdict_names_the_place(tmp_path: Path) -> None:
    verdict = judge_pair(tmp_path, fresh_tensors(), fresh_tensors())
    assert verdict.reasons[0].message.endswith("; docs/gate.md#unchanged")
    assert "docs/gate.md#unchanged" in verdict.summary()


def example_lines() -> list[tuple[str, str]]:
    """A score and a line of the guide's block of examples, for each score that it names."""
    block = TEXT.partition("A line for each score:")[2].split("```")[1]
    pairs = [re.split(r"\s{2,}", line, maxsplit=1) for line in block.strip().splitlines()]
    scores = {"any of several": "exact", "chat": "contains"}
    return [
        (score, line) for line, named in pairs for score in scores.get(named, named).split(", ")
    ]


@pytest.mark.parametrize(("score", "line"), example_lines())
def test_each_example_of_a_suites_line_is_one(tmp_path: Path, score: str, line: str) -> None:
    if score in SCORES_OF_SUITES and not is_there("scorers"):
        pytest.skip("the room scorers is not here")
    (tmp_path / "suite.jsonl").write_text(f"{line}\n")
    method = ScoringMethod(tmp_path / "suite.jsonl", score)  # type: ignore[arg-type]
    (question,) = Suite.read("facts", method).questions
    assert question.line == 1


def test_every_score_but_python_has_an_example() -> None:
    assert {score for score, _ in example_lines()} == set(get_args(Score)) - {"python"}
