"""A fault of every line is read once: findings by check and cause, and how to convert a format."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nested_core.data.lines.example_parsing import FieldNames
from nested_core.data.lines.line_rows import parse_line_to_row
from nested_core.records.dataset import MAX_SHOWN_CAUSES, Finding, group_findings
from nested_core.seams import is_there
from tests.flows.conftest import called
from tests.left_out import slow_except

ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "a preference pair": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "chosen and rejected are preference pairs: to train on both, set training.loss: dpo; to "
        "learn the chosen answers alone, set completion_feature: chosen and "
        "drop_fields: [rejected]",
    ),
    "a preference pair of chats": (
        {"chosen": [{"role": "user", "content": "a"}], "rejected": []},
        "to learn the chosen answers alone, set chat_feature: chosen",
    ),
    "a chat under another name": (
        {"dialogue": [{"role": "user", "content": "a"}]},
        "; set chat_feature: dialogue",
    ),
    "question and answer": (
        {"id": 1, "question": "a", "answer": "b"},
        "set prompt_feature: question and completion_feature: answer",
    ),
    "a prompt and a response": (
        {"prompt": "a", "response": "b"},
        "completion is missing; set completion_feature: response",
    ),
    "columns in capitals": (
        {"Question": "a", "Answer": "b"},
        "set prompt_feature: Question and completion_feature: Answer",
    ),
    "text by another name": ({"content": "a"}, "set text_feature: content"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_line_of_another_format_says_how_to_convert_it(name: str) -> None:
    row, expected = ROWS[name]
    assert expected in str(parse_line_to_row(json.dumps(row).encode(), FieldNames()).message)


def test_no_key_is_named_where_nothing_is_known_of_the_format() -> None:
    message = str(parse_line_to_row(b'{"x": 1, "y": [2]}', FieldNames()).message)
    advice = "; `nested-tune init` takes the names of your columns" if is_there("tables") else ""
    assert message.endswith(f"found x, y{advice}")
    unknown_role = b'{"messages": [{"role": "wizard", "content": "a"}]}'
    assert "set" not in str(parse_line_to_row(unknown_role, FieldNames()).message)


def test_the_hint_names_only_what_is_configured_otherwise() -> None:
    field_names = FieldNames(prompt="question")
    message = str(parse_line_to_row(b'{"prompt": "a", "completion": "b"}', field_names).message)
    assert message.endswith("; set prompt_feature: prompt")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "input": "", "output": "2", "history": [], "system": None},
        {"instruction": "Add.", "input": "1", "output": "2", "text": "Add. 1 2"},
        {"instruction": "Add.", "output": "2", "source": "web"},
    ],
)
def test_empty_fields_plain_text_and_other_fields_are_no_loss(row: dict[str, Any]) -> None:
    names = FieldNames(prompt="instruction", completion="none" if "text" in row else "output")
    assert parse_line_to_row(json.dumps(row).encode(), names).check is None


def test_a_chosen_answer_is_trained_on_where_it_is_configured() -> None:
    row = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}).encode()
    judged = parse_line_to_row(row, FieldNames(completion="chosen"))
    assert (judged.check, judged.content) == (None, "ua\0a\0b")


@pytest.mark.parametrize("name", slow_except(ROWS, "question and answer", reason="5,000 lines"))
def test_five_thousand_lines_of_one_wrong_format_are_one_row(name, write_data, tmp_path) -> None:
    folder = write_data(train=[ROWS[name][0]] * 5_000, valid=[{"text": "a"}])
    arguments = ("validate", "--data", folder, "--no-tokenize", "--model", tmp_path)
    done = called(*arguments, cwd=tmp_path)
    assert done.code == 3
    assert len(done.stdout.splitlines()) < 40
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("error: "))
    assert row.startswith("error: train.jsonl:1: ")
    assert row.endswith(" (and 4,999 more: lines 2, 3, ...)")
    findings = called(*arguments, "--json", cwd=tmp_path).document["findings"]
    assert len([f for f in findings if f["line"]]) == 1_000


def finding(line: int | None, message: str, count: int | None = None) -> Finding:
    return Finding("train.jsonl", line, "error", "bad-json", message, count)


def test_numbers_make_no_cause_of_their_own_and_the_rest_of_a_check_counts() -> None:
    findings = [finding(n, f"not valid JSON at column {n}") for n in range(1, 1001)]
    (group,) = group_findings([*findings, finding(None, "400 more of these", count=400)])
    assert (group.count, group.shown_lines) == (1400, "1, 2, 3, ...")
    assert group.message == "not valid JSON at column 1"


def test_of_many_causes_the_first_are_shown_and_the_rest_is_one_row() -> None:
    groups = group_findings(finding(n, "cause " + "x" * n) for n in range(1, 101))
    assert len(groups) == MAX_SHOWN_CAUSES + 1
    assert groups[-1].count == 100 - MAX_SHOWN_CAUSES
    assert groups[-1].message == "of other causes; the first: cause xxxxxx"


def test_checks_and_files_stay_apart_and_in_order() -> None:
    other = Finding("valid.jsonl", 7, "error", "bad-json", "a")
    warning = Finding("train.jsonl", 2, "warning", "duplicate", "the same example as line 1")
    groups = group_findings([finding(1, "a"), finding(3, "a"), other, warning])
    assert [(g.file, g.check, g.count, g.shown_lines) for g in groups] == [
        ("train.jsonl", "bad-json", 2, "1, 3"),
        ("valid.jsonl", "bad-json", 1, "7"),
        ("train.jsonl", "duplicate", 1, "2"),
    ]
