"""Suites are read strictly: every bad line is reported, with what was expected of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import ConfigError, DatasetError
from nested_core.gate.answers import suites
from nested_core.gate.answers.suites import read_suite

CHAT = [{"role": "user", "content": "Where to?"}]


def write(path: Path, *lines: Any) -> Path:
    """A file of these lines: objects as JSON, bytes as they are."""
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


@pytest.mark.parametrize(
    ("score", "fields", "accepted"),
    [
        ("exact", {"expected": "Suva"}, ("Suva",)),
        ("contains", {"expected": ["Suva", 4]}, ("Suva", "4")),
        ("regex", {"expected": "Su.a$"}, ("Su.a$",)),
        ("number", {"expected": [1, 2.5], "tolerance": 0.1}, (1, 2.5)),
        ("json", {"schema": {"type": "object"}, "expected": {"a": 1}}, ({"a": 1},)),
        ("json", {"schema": {"type": "array"}}, ()),
        ("choice", {"choices": [" a", " b"], "expected": " b"}, (" b",)),
        ("python", {"expected": {"anything": [1]}}, ({"anything": [1]},)),
    ],
)
def test_a_question_of_each_score(tmp_path, score, fields, accepted) -> None:
    path = write(tmp_path / "s.jsonl", {"prompt": "Where to?", "id": "q"} | fields, b"", b"  ")
    (question,) = read_suite(path, score)
    assert question.prompt == "Where to?"
    assert question.accepted == accepted
    assert (question.line, question.name) == (1, "q")


def test_messages_are_turns_and_a_byte_order_mark_is_passed_over(tmp_path) -> None:
    line = b"\xef\xbb\xbf" + json.dumps({"messages": CHAT, "expected": "Suva"}).encode()
    (question,) = read_suite(write(tmp_path / "s.jsonl", line), "exact")
    assert question.prompt == tuple(CHAT)
    assert question.name == "1"


@pytest.mark.parametrize(
    ("score", "line", "problem"),
    [
        ("exact", b"{", "not valid JSON"),
        ("exact", b"[1]", "expected a JSON object"),
        ("exact", b'{"prompt": "a", "prompt": "b", "expected": "c"}', "stands there twice"),
        ("exact", b'{"prompt": "\xff", "expected": "c"}', "not UTF-8"),
        ("exact", {"expected": "a"}, "expected a prompt or messages, and not both"),
        ("exact", {"prompt": "a", "messages": CHAT, "expected": "a"}, "and not both"),
        ("exact", {"prompt": "", "expected": "a"}, "prompt: "),
        ("exact", {"prompt": "a"}, "expected: a text or a list of them, found null"),
        ("exact", {"prompt": "a", "expected": []}, "found an empty list"),
        ("exact", {"prompt": "a", "expected": ["b", True]}, "found true"),
        ("contains", {"prompt": "a", "expected": "  "}, "without any letter"),
        ("exact", {"prompt": "a", "expected": "b", "tolerance": 1}, "tolerance: there is no such"),
        ("exact", {"messages": [], "expected": "b"}, "messages: "),
        ("exact", {"messages": [{"role": "bot", "content": ""}], "expected": "b"}, "role"),
        (
            "exact",
            {"messages": [*CHAT, {"role": "assistant", "content": "b"}], "expected": "b"},
            "must be the user's",
        ),
        ("number", {"prompt": "a", "expected": "4"}, 'a number or a list of them, found "4"'),
        ("number", {"prompt": "a", "expected": 4, "tolerance": -1}, "tolerance: "),
        ("number", b'{"prompt": "a", "expected": 1e400}', "beyond any float"),
        ("number", b'{"prompt": "a", "expected": [1, 1%s]}' % (b"0" * 400), "beyond any float"),
        ("python", b'{"prompt": "a", "expected": {"a": [-1e999]}}', "beyond any float"),
        ("number", {"prompt": "a", "expected": [1] * 1001}, "expected: more than 1,000 answers"),
        ("exact", {"prompt": "a" * 2**20, "expected": "a"}, "longer than 1,048,576 bytes"),
        ("choice", {"prompt": "a", "expected": "b", "choices": ["b"]}, "choices: "),
        ("choice", {"prompt": "a", "expected": "b", "choices": ["c", "d"]}, "none of the choices"),
        ("choice", {"prompt": "a", "expected": "c", "choices": ["c", "c"]}, "there twice"),
        ("choice", {"prompt": "a", "expected": "c"}, "choices is missing"),
        ("json", {"prompt": "a", "expected": {}}, "schema is missing"),
        ("json", {"prompt": "a", "schema": 3}, "schema"),
        ("json", {"prompt": "a", "schema": {}, "expected": 3}, "an object of fields"),
    ],
)
def test_a_bad_line_is_told_with_its_place(tmp_path, score, line, problem) -> None:
    path = write(tmp_path / "s.jsonl", b"", line)
    with pytest.raises(DatasetError) as error:
        read_suite(path, score)
    assert f"{path}:2: " in str(error.value)
    assert problem in str(error.value)
    assert error.value.exit_code == 3


def test_bad_lines_of_one_kind_are_told_in_one_line(tmp_path) -> None:
    good = {"prompt": "a", "expected": "b"}
    path = write(tmp_path / "s.jsonl", *[good, {"prompt": "a", "answer": "b"}] * 20, b"{")
    with pytest.raises(DatasetError) as error:
        read_suite(path, "exact")
    _, one, other = str(error.value).splitlines()
    assert one.startswith(f"  {path}:2: answer: there is no such key")
    assert one.endswith(" (and 19 more: 4, 6, ...)")
    assert other.startswith(f"  {path}:41: ")


def test_all_bad_lines_are_told_in_a_dozen_lines(tmp_path) -> None:
    good = {"prompt": "a", "expected": "b"}
    bad = [{"prompt": "a", "expected": "b", f"key{n}": 1} for n in range(20)]
    path = write(tmp_path / "s.jsonl", *[row for one in bad for row in (good, one)])
    with pytest.raises(DatasetError) as error:
        read_suite(path, "exact")
    lines = str(error.value).splitlines()
    assert [line for line in lines if f"{path}:16: " in line]
    assert lines[-1] == "  and 12 more"
    assert len(lines) <= 12


def test_reading_a_suite_ends_after_a_thousand_bad_lines(tmp_path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"{\n" * 900_000)
    started = time.process_time()
    with pytest.raises(DatasetError, match="More than 1,000 lines are bad"):
        read_suite(path, "exact")
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\n" * 1_000_001, "has more than 1,000,000 lines"),
        (b'{"prompt": "a", "expected": "b"}\n' * 4, r"s.jsonl:4: a suite has at most 3 questions"),
    ],
)
def test_a_suite_has_a_largest_size(tmp_path, monkeypatch, content, problem) -> None:
    monkeypatch.setattr(suites, "MAX_QUESTIONS", 3)
    path = tmp_path / "s.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=problem):
        read_suite(path, "exact")


def test_two_questions_of_one_id_are_an_error(tmp_path) -> None:
    lines = [{"prompt": "a", "expected": "b", "id": name} for name in ("x", 7, "x")]
    with pytest.raises(DatasetError, match=r"s.jsonl:3: the id 'x' is that of line 1"):
        read_suite(write(tmp_path / "s.jsonl", *lines), "exact")


def test_an_empty_suite_is_an_error(tmp_path) -> None:
    with pytest.raises(DatasetError, match="there is no question in it"):
        read_suite(write(tmp_path / "s.jsonl", b""), "exact")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None])
def test_a_suite_that_is_no_file_is_a_configuration_error(tmp_path, make) -> None:
    path = tmp_path / "s.jsonl"
    make(path)
    with pytest.raises(ConfigError, match=r"s.jsonl is not a file; expected a suite"):
        read_suite(path, "exact")
