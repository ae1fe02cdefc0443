"""Rows of tables beside chats: one shape for all, and nothing evaluated in a template."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import ConfigError
from nested_core.rooms.tables.chats import Columns
from nested_core.rooms.tables.data_set import DataSet, Request, make_data_set
from nested_core.rooms.tables.dataset_split import SplitRequest
from nested_core.rooms.tables.source import Source
from tests.builders.data_sets import chat, write_lines

COLUMNS = Columns("{Note}", ("Topic",))


def make(
    data: str,
    folder: Path,
    columns: Columns = COLUMNS,
    system: str | None = None,
    questions: int | None = None,
) -> tuple[DataSet, list[dict[str, Any]]]:
    (folder / "spool").mkdir()
    request = Request(
        True,
        columns,
        system,
        False,
        SplitRequest(questions=questions),
        lambda _turns, answer: len(answer),
    )
    made = make_data_set(Source.find(data, folder / "spool"), request, folder / "made")
    lines = [
        json.loads(line)
        for split in made.rows
        for line in (folder / "made" / f"{split}.jsonl").read_text().splitlines()
    ]
    return made, lines


def write_both(folder: Path, *systems: str | None) -> str:
    """A table of notes, and a chat for each system text, in one folder."""
    notes = "".join(f"note {n},{'good' if n % 2 else 'bad'},x\n" for n in range(20))
    folder.mkdir()
    (folder / "notes.csv").write_text(f"Note,Topic,Other\n{notes}")
    rows = []
    for number, system in enumerate(systems):
        row = chat(f"chat {number}", "good")
        if system is not None:
            row["messages"].insert(0, {"role": "system", "content": system})
        rows.append(row)
    write_lines(folder / "chats.jsonl", rows)
    return str(folder)


def count_systems(lines: list[dict[str, Any]]) -> Counter[str | None]:
    first = [line["messages"][0] for line in lines]
    return Counter(turn["content"] if turn["role"] == "system" else None for turn in first)


def test_a_formulas_error_in_a_cell_counts_as_an_empty_cell(tmp_path: Path) -> None:
    lines = [f"note {n},good,{n}" for n in range(20)]
    lines[3], lines[5], lines[7] = "note 3,#N/A,3", "#REF!,bad,5", "note 7,good,#DIV/0!"
    (tmp_path / "notes.csv").write_text("\n".join(["Note,Topic,Size", *lines, ""]))
    columns = Columns("{Note} ({Size})", ("Topic",))
    made, rows = make(str(tmp_path / "notes.csv"), tmp_path, columns)
    assert made.messages == [
        "left out, without a text in Topic: 1 row (notes.csv:5)",
        "kept, with nothing in Note: 1 row (notes.csv:7)",
        "kept, with nothing in Size: 1 row (notes.csv:9)",
    ]
    assert len(rows) == 19
    assert "#" not in json.dumps(rows)


def test_a_system_text_is_for_rows_that_have_none(tmp_path: Path) -> None:
    data = write_both(tmp_path / "data", "Sort.", None)
    made, lines = make(data, tmp_path, system="Be kind.")
    assert count_systems(lines) == {"Sort.": 1, "Be kind.": 21}
    assert made.messages == ["not trained on: Other"]


def test_marks_of_chats_stay_with_their_turns(tmp_path: Path) -> None:
    data = write_both(tmp_path / "data")
    marked = {"messages": [*chat("a", "no")["messages"], *chat("b", "good")["messages"]]}
    marked["messages"][1]["weight"] = 0
    write_lines(tmp_path / "data" / "chats.jsonl", [marked])
    _, lines = make(data, tmp_path, system="Sort.")
    (found,) = [line for line in lines if "loss_mask" in line]
    assert [turn["role"] for turn in found["messages"]] == ["system", *["user", "assistant"] * 2]
    assert found["loss_mask"] == [1, 1, 0, 1, 1]


def test_a_template_fills_each_column_once_and_looks_into_no_value() -> None:
    columns = Columns("{{{Id}}}: {Text}\n{Text}", ())
    assert columns.asked == ("Id", "Text", "Text")
    assert columns.read_question({"Id": 3, "Text": "{Id} \\n %s {0}"}) == (
        "{3}: {Id} \\n %s {0}\n{Id} \\n %s {0}"
    )
    assert columns.read_question({"Id": None, "Text": " "}) == ""


@pytest.mark.parametrize("text", ["", "{}", "{a", "a}", "}{", "{{a}}", "no column"])
def test_a_text_without_a_column_between_braces_names_none(text: str) -> None:
    assert Columns(text, ()).asked == ()


def test_values_keep_their_types_in_an_object_and_are_json_as_texts(tmp_path: Path) -> None:
    rows = [{"q": f"Q{n}", "n": n / 2, "is": n > 2, "tags": ["a"], "no": None} for n in range(12)]
    write_lines(tmp_path / "rows.jsonl", rows)
    columns = Columns("{q}", ("n", "is", "tags", "no"), is_object=True)
    made, lines = make(str(tmp_path / "rows.jsonl"), tmp_path, columns)
    (answer,) = [m["messages"][1] for m in lines if m["messages"][0]["content"] == "Q3"]
    assert answer["content"] == '{"n": 1.5, "is": true, "tags": ["a"], "no": null}'
    assert made.messages[0].startswith(
        "null in the answer, for nothing is in no: 12 rows (rows.jsonl:1,"
    )
    assert made.messages[0].endswith("rows.jsonl:10, ...)")
    assert [Columns(columns.question, (name,)).read_answer(rows[3]) for name in rows[3]] == [
        *("Q3", "1.5", "true", '["a"]', "")
    ]


def test_rows_without_an_answer_are_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Note,Topic\n" + "n,\n,t\n" + "m,t\nk,t\nl,t\no,t\n")
    made, lines = make(str(tmp_path / "a.csv"), tmp_path)
    assert made.messages == [
        "left out, without a text in Topic: 1 row (a.csv:2)",
        "left out, without a text in Note: 1 row (a.csv:3)",
    ]
    assert len(lines) == 4
    both = Columns("{Note}: {Topic}", ("Topic",))
    (tmp_path / "both").mkdir()
    made, lines = make(str(tmp_path / "a.csv"), tmp_path / "both", both)
    assert len(lines) == 5
    assert made.messages[1:] == ["kept, with nothing in Note: 1 row (a.csv:3)"]


def test_rows_that_were_left_out_are_named_where_too_few_are_left(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Note,Topic\n" + "n,\n,t\n" + "m,t\nk,\n")
    with pytest.raises(ConfigError) as refused:
        make(str(tmp_path / "a.csv"), tmp_path)
    told = str(refused.value)
    assert "a.csv has 1 row, too few to take any out" in told
    assert "left out, without a text in Topic: 2 rows (a.csv:2, a.csv:5)." in told


def test_an_eval_set_has_questions_of_held_out_rows_and_the_share_of_the_majority(tmp_path) -> None:
    data = write_both(tmp_path / "data")
    (tmp_path / "data" / "chats.jsonl").unlink()
    made, _ = make(data, tmp_path, questions=6)
    assert made.rows == {"train": 12, "valid": 2, "test": 6}
    lines = (tmp_path / "made" / "suite.jsonl").read_text().splitlines()
    asked = {json.loads(line)["messages"][0]["content"] for line in lines}
    held_out = (tmp_path / "made" / "test.jsonl").read_text().splitlines()
    assert asked == {json.loads(line)["messages"][0]["content"] for line in held_out}
    assert made.eval_set is not None
    answer, right = made.eval_set.fixed
    assert right == sum(json.loads(line)["expected"] == answer for line in lines)
    assert made.eval_set.describe_baseline() == (
        f"one answer to all, {answer!r}, would be right for {right} of 6 ({right / 6:.0%})"
    )


def test_the_same_rows_give_the_same_files(tmp_path: Path) -> None:
    data = write_both(tmp_path / "data", "Sort.")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make(data, tmp_path / name, questions=4)
    for path in (tmp_path / "one" / "made").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "made" / path.name).read_bytes()
