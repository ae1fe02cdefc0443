"""Answers that are a few labels: counted, scored by label, and one label for all is broken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from nested_core.data.data_settings import DataSettings
from nested_core.records.answers import AnsweringRole, AnswerRecord
from nested_core.rooms.tables.labels import (
    find_labels,
    tabulate_labels_of_answers,
    tabulate_labels_of_data,
)
from nested_core.text.document import Table, Text
from tests.builders.data_sets import chat, write_lines


def answers_of(
    model: AnsweringRole, expected: Sequence[str], given: Sequence[str]
) -> list[AnswerRecord]:
    return [
        AnswerRecord(
            task="topics",
            model=model,
            line=line,
            question=f"line {line}",
            answer=answer,
            score=float(answer == right),
            tokens=2,
            empty=False,
            endless=False,
            repeated=False,
            seconds=0.1,
            expected=right,
        )
        for line, (right, answer) in enumerate(zip(expected, given, strict=True), 1)
    ]


def in_rows(records: Sequence[AnswerRecord]) -> list[tuple[str, str | None, str, float]]:
    return [(r.model, r.expected, r.answer, r.score) for r in records]


EXPECTED = ["billing"] * 6 + ["shipping"] * 4
JUDGED = ["billing"] * 5 + ["shipping"] + ["billing"] * 3 + ["shipping"]


def test_right_answers_stand_by_label_beside_the_majority() -> None:
    records = answers_of("base", EXPECTED, ["?"] * 10) + answers_of("candidate", EXPECTED, JUDGED)
    (table,) = tabulate_labels_of_answers("topics", in_rows(records))
    assert isinstance(table, Table)
    assert table.columns == ("label", "questions", "base", "candidate")
    assert table.rows == [("billing", 6, 0, 5), ("shipping", 4, 0, 1)]
    assert table.caption == "topics by label; always answering 'billing' gets 6 of 10 (60%)"


def test_answers_that_are_no_labels_have_no_table() -> None:
    texts = [f"In town {n}." for n in range(10)]
    assert not list(tabulate_labels_of_answers("topics", in_rows(answers_of("base", texts, texts))))


@pytest.mark.parametrize(
    ("counts", "labels"),
    [
        ({"no": 3, "yes": 7}, {"yes": 7, "no": 3}),
        ({"yes": 9}, {}),
        ({"a": 1, "b": 1, "c": 3}, {}),
        ({"a" * 101: 5, "b": 5}, {}),
        ({str(n): 2 for n in range(51)}, {}),
    ],
)
def test_labels_are_a_few_short_answers_given_again_and_again(counts, labels) -> None:
    found = find_labels(counts)
    assert found == labels
    assert list(found) == list(labels)


def test_labels_of_a_data_set_are_counted_in_each_split(tmp_path: Path) -> None:
    rows = [chat(f"Q{n}?", "yes" if n % 3 else "no") for n in range(12)]
    write_lines(tmp_path / "train.jsonl", rows)
    write_lines(tmp_path / "valid.jsonl", rows[:2])
    (table,) = tabulate_labels_of_data(DataSettings(str(tmp_path)))
    assert isinstance(table, Table)
    assert table.columns == ("answer", "train.jsonl", "valid.jsonl")
    assert table.rows == [("yes", "8 (67%)", "1 (50%)"), ("no", "4 (33%)", "1 (50%)")]
    write_lines(tmp_path / "valid.jsonl", rows[:4])
    write_lines(tmp_path / "train.jsonl", [row for row in rows if "yes" in str(row)])
    _, warning = tabulate_labels_of_data(DataSettings(str(tmp_path)))
    assert warning == Text(
        "warning: no row of train.jsonl has the label 'no', which other splits have: it will not "
        "be learnt. Shuffle the rows before they are split."
    )
    write_lines(tmp_path / "valid.jsonl", [chat("Q?", "a long answer " * 20)])
    assert not list(tabulate_labels_of_data(DataSettings(str(tmp_path))))


def test_an_answer_that_is_given_once_is_no_label_that_train_lacks(tmp_path: Path) -> None:
    labelled = [chat(f"{n}?", f"topic {n % 5}") for n in range(100)]
    write_lines(tmp_path / "train.jsonl", labelled)
    rows = [*[chat(f"of {n}?", f"Go and see town {n}") for n in range(20)], chat("x?", "rare")]
    write_lines(tmp_path / "valid.jsonl", [*rows, chat("y?", "rare")])
    blocks = tabulate_labels_of_data(DataSettings(str(tmp_path)))
    warnings = [block.text for block in blocks if isinstance(block, Text)]
    assert [text.partition(",")[0] for text in warnings] == [
        "warning: no row of train.jsonl has the label 'rare'"
    ]
