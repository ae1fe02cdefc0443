"""Sentences of a verdict on pages and in state messages."""

from __future__ import annotations

from typing import Any

from tasks.verdict_text import describe_suite

TASK: dict[str, Any] = {
    "name": "capitals",
    "questions": 15,
    "base": 0.0,
    "parent": None,
    "candidate": 14 / 15,
    "verdict": "passed",
}


def test_a_suite_says_how_many_were_right_and_whether_it_failed() -> None:
    passed = "capitals: 0 of 15 right before, 14 of 15 after"
    assert describe_suite(TASK) == passed
    assert describe_suite(TASK | {"verdict": "failed"}) == f"{passed} (failed)"
    with_rivals = TASK | {"parent": 0.2, "champion": 1.0}
    assert describe_suite(with_rivals) == (
        "capitals: 3 of 15 right before, 14 of 15 after, champion 15 of 15"
    )
