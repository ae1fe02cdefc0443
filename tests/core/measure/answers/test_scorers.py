"""Scores of answers by texts and numbers."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_core.config.sections import Score
from nested_core.measure.answers.scorers import last_number, normalise_white_space
from tests.builders.suites import score_each

# By score: answer, fields of the question, and what it gets.
SCORES: dict[Score, list[tuple[str, dict[str, Any], float]]] = {
    "exact": [
        ("  Port\n Louis ", {"expected": "Port Louis"}, 1),
        ("Cafe\u0301", {"expected": "Caf\u00e9"}, 1),
        ("suva", {"expected": "Suva"}, 0),
        ("Suva.", {"expected": ["Nadi", "Suva."]}, 1),
    ],
    "contains": [
        ("It is  Port\tLouis.", {"expected": "Port Louis"}, 1),
        ("It is Suva.", {"expected": ["suva", "Nadi"]}, 0),
    ],
    "number": [
        ("3 and 4 make 7.", {"expected": 7}, 1),
        ("7 and then 3", {"expected": 7}, 0),
        ("about $1,234.50!", {"expected": 1234.5}, 1),
        ("0.31", {"expected": 0.3, "tolerance": 0.01}, 1),
        ("0.311", {"expected": 0.3, "tolerance": 0.01}, 0),
        ("none", {"expected": 0}, 0),
    ],
}


@pytest.mark.parametrize("method", SCORES)
def test_scores(tmp_path: Path, method: Score) -> None:
    answers, fields, expected = zip(*SCORES[method], strict=True)
    assert score_each(tmp_path, method, answers, fields) == list(expected)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("GPT-4", "4"),
        ("10%-20%", "20"),
        ("x=-4", "-4"),
        ("_-4_", "-4"),
        ("-5", "-5"),
        ("\u22125 degrees", "-5"),
        ("3-4", "4"),
        ("2.5e3", "2500"),
        ("1,2", "2"),
        ("12,345,678 people", "12345678"),
        ("12\u202f345\u00a0678 people", "12345678"),
        ("in rooms 1 234", "234"),
        (".5", "0.5"),
        ("It is 42.", "42"),
        ("2024-11-21", "21"),
        ("It is 4.25.", "4.25"),
        ("7 of them, see Section 4.2.7.", "7"),
        ("-12 on 28.11.2026", "-12"),
        ("1.2.3 has 5", "5"),
        ("from 1...5", "5"),
    ],
)
def test_the_last_number_of_a_text(text, number) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    [
        "28.11.2026",
        "v1.2.3",
        "1.2.3rc4",
        "v1.2.3-4",
        "1.2.3-rc.1+5",
        "-1.2.3",
        "192.168.0.1",
        "1.234.567",
        "1,234.5.6",
    ],
)
def test_digits_with_more_than_one_point_are_no_number(text) -> None:
    assert last_number(text) is None


@given(st.text())
@settings(max_examples=50)
def test_any_text_has_a_normal_form_and_a_last_number_or_none(text) -> None:
    assert normalise_white_space(normalise_white_space(text)) == normalise_white_space(text)
    last_number(text)


@given(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-1_000_000, max_value=1_000_000)
)
def test_a_number_is_read_as_it_was_written(number) -> None:
    assert last_number(f"The answer is {number:f}.") == Decimal(f"{number:f}")
