"""Suites are read strictly: every bad line is reported, with what was expected of it."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from nested_core.config.sections import Score
from nested_core.errors import ConfigError, DatasetError
from nested_core.measure.answers import suites
from nested_core.measure.answers.scorers import ScoringMethod
from nested_core.measure.answers.suite_answers import Suite
from nested_core.measure.answers.suite_files import holds_questions
from nested_core.measure.answers.suites import fold_prompt, read_suite
from tests.left_out import needs_rooms

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
        ("json", {"expected": {"a": 1}}, ({"a": 1},)),
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


def test_a_text_and_the_same_text_as_a_users_turn_are_one_prompt(tmp_path) -> None:
    turns = [[{"role": role, "content": "where  TO?"}] for role in ("user", "tool")]
    asked: list[dict[str, Any]] = [{"prompt": "Where to?"}, *({"messages": t} for t in turns)]
    path = write(tmp_path / "s.jsonl", *(line | {"expected": "Suva"} for line in asked))
    text, user, tool = map(fold_prompt, read_suite(path, "exact"))
    assert text == user != tool


@pytest.mark.parametrize(
    ("score", "line", "problem"),
    [
        ("exact", b"{", "not valid JSON"),
        ("exact", b"[1]", "expected a JSON object"),
        ("exact", b'{"prompt": "a", "prompt": "b", "expected": "c"}', "is there twice"),
        ("exact", b'{"prompt": "\xff", "expected": "c"}', "not UTF-8"),
        ("exact", {"expected": "a"}, "expected a prompt or messages, and not both"),
        ("exact", {"prompt": "a", "messages": CHAT, "expected": "a"}, "and not both"),
        ("exact", {"prompt": "", "expected": "a"}, "prompt: "),
        ("exact", {"prompt": " \n", "expected": "a"}, "prompt: the question has no text"),
        (
            "exact",
            {"messages": [{"role": "user", "content": ""}], "expected": "a"},
            "the question has no text",
        ),
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
        ("json", {"prompt": "a", "expected": {}}, "an object of fields that must be equal, or"),
        ("json", {"prompt": "a", "schema": None}, "`schema`, a JSON schema, or both"),
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


@needs_rooms("tables")
@pytest.mark.parametrize(
    ("score", "rows"),
    [
        ("contains", [("a;b", "Suva"), ('two "lines"\nof it', "4"), ("\u00e9\U0001f600", "yes")]),
        ("number", [("6 * 7?", 42), ("a half?", 0.5)]),
        ("json", [("as JSON", {"a": [1, None]})]),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "csv", "semicolons.csv", "tsv", "yaml", "YML"])
def test_a_suite_is_the_same_in_every_form(tmp_path, form, score, rows) -> None:
    more = {"schema": {"type": "object"}} if score == "json" else {}
    questions = [{"prompt": prompt, "expected": expected} | more for prompt, expected in rows]
    expected = read_suite(write(tmp_path / "s.jsonl", *questions), score)
    path = tmp_path / f"t.{form}"
    if form in ("yaml", "YML"):
        path.write_text(yaml.safe_dump(questions, allow_unicode=True))
    elif form == "jsonl":
        write(path, *questions)
    else:
        cells = [
            {k: v if isinstance(v, str) else json.dumps(v) for k, v in q.items()} for q in questions
        ]
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            delimiter = {"csv": ",", "semicolons.csv": ";", "tsv": "\t"}[form]
            table = csv.DictWriter(file, list(questions[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(cells)
    read = read_suite(path, score)
    assert [(q.prompt, q.accepted, q.fields) for q in read] == [
        (q.prompt, q.accepted, q.fields) for q in expected
    ]


@needs_rooms("tables")
def test_chats_choices_and_lists_of_answers_in_a_table_and_in_yaml(tmp_path: Path) -> None:
    table = tmp_path / "s.csv"
    chat = json.dumps(CHAT).replace('"', '""')
    table.write_text(
        f'id,prompt,messages,choices,expected\n,,"{chat}","[""a"", ""b""]",b\n'
        f'q2,Where?,,"[""a"", ""b""]",a\n'
    )
    first, second = read_suite(table, "choice")
    assert (first.name, first.prompt, first.accepted) == ("2", tuple(CHAT), ("b",))
    assert (second.name, second.prompt, second.choices) == ("q2", "Where?", ("a", "b"))
    path = tmp_path / "s.yaml"
    path.write_text("# a comment\n- prompt: Where?\n  expected: [no, 4]\n")
    (question,) = read_suite(path, "contains")
    assert (question.accepted, question.line) == (("no", "4"), 2)


ANSWERS = ("1.10", "1e3", "12345678901234567890123.0", "-0", "True", "no", "2026-11-21", "1_000")


@pytest.mark.parametrize("score", ["exact", "contains", "regex", "choice"])
def test_an_answer_in_yaml_that_is_compared_as_text_stands_as_it_is_written(
    tmp_path: Path, score: Score
) -> None:
    path = tmp_path / "s.yaml"
    listed = f"[{', '.join(ANSWERS)}]"
    choices = f"choices: {listed}, " if score == "choice" else ""
    path.write_text(
        f"- {{prompt: a, {choices}expected: {listed}}}\n- {{prompt: a, {choices}expected: 1.10}}\n"
    )
    several, one = read_suite(path, score)
    assert (several.accepted, one.accepted) == (ANSWERS, ("1.10",))
    assert several.choices == (ANSWERS if score == "choice" else ())


@needs_rooms("tables")
@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("s.csv", b"question,expected\na,b\nc,d\n", r"s.csv:2: question: .* \(and 1 more: 3\)"),
        ("s.csv", b"prompt,expected\na,b,c\n", "s.csv:2: expected 2 cells as in the header"),
        ("s.csv", b'prompt,expected\na,b\n"c,d\n', "s.csv:3: not valid CSV"),
        ("s.csv", b"prompt,expected\n\xff,b\n", "s.csv:2: a byte is not UTF-8"),
        ("s.csv", b"prompt,expected\na,\n", "s.csv:2: expected: a text .* found null"),
        ("s.csv", b"", "s.csv:1: expected a header"),
        ("s.yaml", b"- prompt: a\n  expected: b\n- 3\n", "s.yaml:3: expected a JSON object"),
        ("s.yaml", b"- prompt: a\n  answer: b\n", "s.yaml:1: answer: there is no such key"),
        ("s.yaml", b"- &a {prompt: a, expected: b}\n- *a\n", "an anchor or alias"),
        (
            "s.yaml",
            b"- {prompt: a, expected: b, prompt: c}\n",
            "the key 'prompt', which is in line 1 too",
        ),
        ("s.yaml", b"- {prompt: .inf, expected: b}\n", "Infinity is no JSON number"),
        ("s.yaml", b'- {prompt: "\\ud800", expected: b}\n', "half of a surrogate pair"),
        ("s.yaml", b"prompt: a\nexpected: b\n", "should be a list of questions.*found a dict"),
        ("s.yaml", b"- [", "is not usable YAML: line 1"),
        ("s.yaml", b"#" * (4 * 2**20 + 1), "larger than 4,194,304 bytes"),
    ],
)
def test_mistakes_in_a_table_or_in_yaml_are_told_with_their_lines(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=problem) as error:
        read_suite(tmp_path / name, "contains")
    assert len(str(error.value).splitlines()) <= 2


def test_what_lines_of_one_kind_hold_besides_is_no_other_kind(tmp_path: Path) -> None:
    found: list[Any] = [None, True, {}, []]
    lines = [{"prompt": "a", "expected": value} for value in found]
    with pytest.raises(DatasetError) as error:
        read_suite(write(tmp_path / "s.jsonl", *lines, b"{", b'{"prompt": '), "exact")
    _, expected, syntax = str(error.value).splitlines()
    assert expected.endswith("found null (and 3 more: 2, 3, ...)")
    assert syntax.startswith(f"  {tmp_path / 's.jsonl'}:5: not valid JSON")
    assert syntax.endswith("(and 1 more: 6)")


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
        (
            b'{"prompt": "a", "expected": "b"}\n' * 4,
            r"s.jsonl:4: an eval set has at most 3 questions",
        ),
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


def test_a_suite_may_be_a_link_to_a_file(tmp_path) -> None:
    path = write(tmp_path / "s.jsonl", {"prompt": "a", "expected": "b"})
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    assert read_suite(link, "exact") == read_suite(path, "exact")
    linked, direct = (Suite.read("s", ScoringMethod(one, "exact")) for one in (link, path))
    assert linked.digest == direct.digest
    (tmp_path / "s.yaml").write_text("[{prompt: a, expected: b}]")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "s.yaml")
    assert holds_questions(tmp_path / "link.yaml")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None])
def test_a_suite_that_is_no_file_is_a_configuration_error(tmp_path, make) -> None:
    path = tmp_path / "s.jsonl"
    make(path)
    with pytest.raises(
        ConfigError, match=r"^eval set: .*s.jsonl is not a file. Expected JSON Lines"
    ):
        read_suite(path, "exact")
