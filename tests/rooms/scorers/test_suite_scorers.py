"""What a suite brings along to score answers may raise, hang, print or die, and never passes."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.sections import Score
from nested_core.errors import DatasetError
from nested_core.measure.answers.scorers import ScoringMethod, score_answers
from nested_core.measure.answers.suite_answers import Suite
from nested_core.measure.answers.suites import read_suite
from nested_core.rooms.scorers import suite_scorers
from nested_core.rooms.scorers.scoring_process import first_json_value
from tests.builders.suites import score_each
from tests.core.measure.answers.test_suites import write

pytestmark = pytest.mark.slow("starts processes")

SLOW = "(?i)" + "[\u0100-\uffff]" * 20_000  # a fast machine compiles it in minutes
TIMED_OUT = pytest.mark.slow("waits until a time limit ends, as others do")
OBJECT = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}


def shorten_limit(monkeypatch: pytest.MonkeyPatch, problem: str = "it took more than") -> None:
    """One second a question, where the test asks only what never ends."""
    if problem.startswith("it took more than"):
        monkeypatch.setattr(suite_scorers, "QUESTION_TIMEOUT_SECONDS", 1.0)


def score(tmp_path: Path, method: Score, answer: str, function: str | None = None, **fields):
    """The score of one answer to one question."""
    path = write(tmp_path / "suite.jsonl", {"prompt": "?", "id": "first"} | fields)
    questions = read_suite(path, method)
    return score_answers(ScoringMethod(path, method, function), questions, [answer])[0]


# By score: answer, fields of the question, and what it gets.
SCORES: dict[Score, list[tuple[str, dict[str, Any], float]]] = {
    "regex": [
        ("in 1874, Suva", {"expected": r"\d{4}, S"}, 1),
        ("in 1874", {"expected": [r"^\d", "x"]}, 0),
    ],
    "json": [
        ('Here: {"city": "Suva"} {"city": 1}', {"schema": OBJECT}, 1),
        ('```json\n{"city": 4}\n```', {"schema": OBJECT}, 0),
        ("nothing", {"schema": True}, 0),
        ('{"city": "a", "n": 1.0}', {"schema": OBJECT, "expected": {"n": 1}}, 1),
        ('{"city": "a", "n": true}', {"schema": OBJECT, "expected": {"n": 1}}, 0),
        ('{"city": "a"}', {"schema": OBJECT, "expected": {"n": 1}}, 0),
        ("[1]", {"schema": {}, "expected": {"n": 1}}, 0),
        ('So: {"n": 1, "m": 2}', {"expected": {"n": 1}}, 1),
        ('{"n": 2}', {"schema": None, "expected": {"n": 1}}, 0),
    ],
}


@pytest.mark.parametrize("method", SCORES)
def test_scores(tmp_path: Path, method: Score) -> None:
    answers, fields, expected = zip(*SCORES[method], strict=True)
    assert score_each(tmp_path, method, answers, fields) == list(expected)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('The 2 items: ["a", "b"]', ["a", "b"]),
        ('[broken {"a": 1}', {"a": 1}),
        ("42 it is", 42),
        ('say "yes"', "yes"),
        ("true", True),
        ('[NaN, 1] {"b": 2}', {"b": 2}),
    ],
)
def test_the_first_json_value_of_a_text(text, value) -> None:
    assert first_json_value(text) == value


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of scorers, found in the folder that is worked in."""
    monkeypatch.chdir(tmp_path)

    def write_module(body: str) -> str:
        source = f"def judge(answer, question):\n{textwrap.indent(body, '    ')}\n"
        (tmp_path / "own_scorers.py").write_text(source)
        return "own_scorers:judge"

    return write_module


def test_a_python_function_gets_the_answer_and_the_line(tmp_path, module) -> None:
    function = module("return answer == question['expected']['word'] and question['id'] == 'first'")
    fields = {"expected": {"word": "yes"}}
    assert score(tmp_path, "python", "yes", function, **fields) == 1
    assert score(tmp_path, "python", "no", function, **fields) == 0


def test_a_function_that_prints_spoils_no_output(tmp_path, module, capfd) -> None:
    body = (
        "import os, sys\nprint('{}')\nos.write(1, b'raw')\nprint('x', file=sys.stderr)\nreturn 0.5"
    )
    assert score(tmp_path, "python", "a", module(body), expected="a") == 0.5
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("raise RuntimeError('no such answer')", "RuntimeError: no such answer"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "its process ended with exit status 0"),
        ("import os; os.kill(os.getpid(), 9)", "its process was ended by SIGKILL"),
        ("import time; time.sleep(100)", "it took more than 1 seconds"),
        pytest.param(
            "import re; return bool(re.match('(a+)+$', 'a' * 40 + 'b'))",
            "it took more than 1 seconds",
            marks=TIMED_OUT,
        ),
        ("return None", "TypeError: it returned a NoneType, not a number from 0 to 1"),
        ("return float('nan')", "ValueError: it returned nan, not a number from 0 to 1"),
        (
            "class Liar(float):\n    __le__ = __ge__ = lambda *_: True\nreturn Liar(7e300)",
            "ValueError: it returned 7e+300, not a number from 0 to 1",
        ),
        ("return 2", "ValueError: it returned 2, not a number from 0 to 1"),
        ("return input()", "EOFError"),
    ],
)
def test_a_function_that_fails_is_an_error_that_names_the_question(
    tmp_path, monkeypatch, module, body, problem
) -> None:
    shorten_limit(monkeypatch, problem)
    with pytest.raises(DatasetError) as error:
        score(tmp_path, "python", "a", module(body), expected="a")
    assert f"suite.jsonl:1: the function own_scorers:judge: {problem}" in str(error.value)
    assert error.value.exit_code == 3


TO_PIPE = """
import os
while True:
    os.write(3, %s)  # the first descriptor that the process opens
"""


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("b'x' * 60_000", "something else than an answer came from its process"),
        ("b'\\xff\\xfe\\n'", "something else than an answer came from its process"),
        ("b'{\"ready\": true}\\n'", "something else than an answer came from its process"),
        ("b'{\"error\": 7}\\n'", "something else than an answer came from its process"),
        ("b'{\"answer\": 1e300}\\n'", r"it answered 1e\+300, not a score"),
        ("b'{\"answer\": true}\\n'", "it answered True, not a score"),
        pytest.param(
            "b'x' + bytes(__import__('time').sleep(0.01) or 0)",
            "it took more than 1 seconds",
            marks=TIMED_OUT,
        ),
    ],
)
def test_what_else_comes_through_the_pipe_is_an_error_in_bounded_time(
    tmp_path, monkeypatch, module, written, problem
) -> None:
    shorten_limit(monkeypatch, problem)
    with pytest.raises(DatasetError, match=rf"suite.jsonl:1: the function .*: {problem}"):
        score(tmp_path, "python", "a", module(TO_PIPE % written), expected="a")


SOUND_SCHEMA = {
    "$id": "https://example.org/sound",
    "$defs": {"a": {"$anchor": "named"}, "b": {"$id": "b", "type": "string"}},
    "const": {"$ref": "#/nowhere"},
    "properties": {"$ref": {"$ref": "#named"}, "b": {"$ref": "b"}, "self": {"$ref": "#"}},
    "items": {"$ref": "https://json-schema.org/draft/2020-12/schema"},
}


@pytest.mark.parametrize(
    ("method", "fields", "problem"),
    [
        ("regex", {"expected": "("}, "'(' is no regular expression: missing )"),
        ("regex", {"expected": ["a", "(" * 9000 + ")" * 9000]}, "is no regular expression"),
        ("json", {"schema": {"type": "objekt"}}, "schema.type is no JSON schema"),
        ("json", {"schema": {"$schema": "urn:x"}}, "'urn:x' is no JSON Schema that is known"),
        ("json", {"schema": {"pattern": "("}}, "schema.pattern is no JSON schema"),
        ("json", {"schema": {"$ref": "#/$defs/a"}}, "schema: $ref '/$defs/a' leads to nothing"),
        ("json", {"schema": {"$ref": "#"}}, "schema: a $ref leads back to itself"),
        (
            "json",
            {"schema": {"$dynamicRef": "#none"}},
            "leads to nothing; other schemas are not loaded",
        ),
        (
            "json",
            {"schema": {"properties": {"$ref": {"items": {"$ref": "https://example.org/a"}}}}},
            "schema: $ref 'https://example.org/a' leads to nothing; other schemas are not loaded",
        ),
    ],
    ids=str,
)
def test_patterns_and_schemas_are_compiled_before_anything_is_asked(
    tmp_path, method, fields, problem
) -> None:
    good = {"expected": "a"} if method == "regex" else {"schema": SOUND_SCHEMA}
    path = write(tmp_path / "suite.jsonl", {"prompt": "?"} | good, {"prompt": "?"} | fields)
    with pytest.raises(DatasetError) as error:
        Suite.read("s", ScoringMethod(path, method))
    assert f"{path}:2: " in str(error.value)
    assert problem in str(error.value)


@pytest.mark.slow("starts processes")
@pytest.mark.parametrize(
    ("method", "fields", "problem"),
    [
        pytest.param("regex", {"expected": SLOW}, "the regular expression", marks=TIMED_OUT),
        ("json", {"schema": {"pattern": SLOW}}, "the JSON schema"),
    ],
    ids=["regex", "json"],
)
def test_patterns_and_schemas_are_compiled_in_a_process_with_a_time_limit(
    tmp_path, monkeypatch, method, fields, problem
) -> None:
    shorten_limit(monkeypatch)
    path = write(tmp_path / "suite.jsonl", {"prompt": "?"} | fields)
    with pytest.raises(DatasetError, match=rf"suite.jsonl:1: {problem}: it took more than 1 sec"):
        Suite.read("s", ScoringMethod(path, method))


@pytest.mark.parametrize("function", ["no_such_module:judge", "json:no_such_function", "json"])
def test_a_function_that_is_not_there_is_an_error(tmp_path, function) -> None:
    with pytest.raises(DatasetError, match=rf"the function {function}: \w+Error"):
        score(tmp_path, "python", "a", function, expected="a")


def test_a_module_may_define_a_data_class_with_annotations_as_text(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        "from __future__ import annotations",
        "from dataclasses import dataclass",
        "@dataclass",
    ]
    lines += ["class Part:", "    weight: float", "def judge(answer, question):"]
    Path("parts.py").write_text("\n".join([*lines, "    return Part(1.0).weight", ""]))
    assert score(tmp_path, "python", "a", "parts:judge", expected="a") == 1


def test_a_module_in_a_package_may_import_its_neighbours(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pkg").mkdir()
    Path("pkg", "helper.py").write_text("value = 1\n")
    lines = ["from .helper import value", "def judge(answer, question):", "    return value", ""]
    Path("pkg", "judging.py").write_text("\n".join(lines))
    assert score(tmp_path, "python", "a", "pkg.judging:judge", expected="a") == 1


@pytest.mark.parametrize("name", ["flows", "nested_core", "pytest", "tasks"])
def test_a_module_may_be_named_like_an_installed_package(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.py").write_text("def judge(answer, question):\n    return 1\n")
    assert score(tmp_path, "python", "a", f"{name}:judge", expected="a") == 1


def test_a_child_that_a_function_leaves_behind_holds_nothing_up(tmp_path, module) -> None:
    body = "import subprocess; subprocess.Popen(['sleep', '100']); return 1"
    started = time.monotonic()
    assert score(tmp_path, "python", "a", module(body), expected="a") == 1
    assert time.monotonic() - started < 30


def test_a_pattern_that_takes_for_ever_is_an_error(tmp_path, monkeypatch) -> None:
    shorten_limit(monkeypatch)
    with pytest.raises(DatasetError, match="the regular expression: it took more than 1 seconds"):
        score(tmp_path, "regex", "a" * 40 + "b", expected="(a+)+$")


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"$ref": "https://example.invalid/schema"}, "Unresolvable"),
        ({"$ref": "#"}, "RecursionError"),
        pytest.param(
            {"type": "string", "pattern": "(a+)+$"}, "it took more than 1 seconds", marks=TIMED_OUT
        ),
    ],
)
def test_a_schema_that_cannot_be_decided_is_an_error(
    tmp_path, monkeypatch, schema, problem
) -> None:
    shorten_limit(monkeypatch, problem)
    answer = '"' + "a" * 40 + 'b"'
    with pytest.raises(DatasetError, match=rf"suite.jsonl:1: the JSON schema: .*{problem}"):
        score(tmp_path, "json", answer, schema=schema)


def test_a_deeply_nested_answer_is_a_wrong_one(tmp_path) -> None:
    assert score(tmp_path, "json", "[" * 100_000, schema=True) == 0


@pytest.mark.parametrize(
    ("score", "expected", "best"),
    [
        ("json", [{"a": 1}, {"a": 1, "b": 2}, {"a": 2}, {"a": 3}], ('{"a": 1, "b": 2}', 0.5)),
        ("regex", ["(?i)^spam$", "^spam$", r"\bham\.?", "eggs"], ("spam", 0.5)),
        ("regex", ["(?i)^(spam|ham)$", "^ham$", "^ham$", "eggs"], ("ham", 0.75)),
        ("regex", ["^(yes|yep)$", "^(yes|yep)$", "^(no|nope)$", r"^no\|thing$"], ("yes", 0.5)),
    ],
)
def test_the_best_constant_answer_is_scored_as_the_suite_scores(
    tmp_path: Path, score, expected, best
) -> None:
    lines = [{"prompt": f"{i}?", "expected": each} for i, each in enumerate(expected)]
    path = write(tmp_path / "suite.jsonl", *lines)
    suite = Suite.read("each", ScoringMethod(path, score))
    assert suite.find_best_constant(range(1, 5)) == best


def test_a_schema_alone_has_no_best_constant_answer(tmp_path: Path) -> None:
    line = {"prompt": "1?", "schema": {"type": "object"}}
    suite = Suite.read("each", ScoringMethod(write(tmp_path / "b.jsonl", line), "json"))
    assert suite.find_best_constant([1]) is None
