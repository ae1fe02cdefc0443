"""Every bad input gives exactly the (file, line, check) that it should, and nothing else."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import chain
from typing import Any

import pytest

from tests.builders.data_sets import GOOD, HELD_OUT, chat, errors_in, load, write_lines
from tests.core.data.conftest import WriteData


def turn(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def talk(*roles: str) -> dict[str, Any]:
    return {"messages": [turn(role, f"{role} {index}") for index, role in enumerate(roles)]}


def asked(*turns: Any) -> dict[str, Any]:
    """A conversation that begins with a question."""
    return {"messages": [turn("user", "a"), *turns]}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

BAD_LINES: dict[str, tuple[Any, str]] = {
    "latin-1 byte": (b'{"text": "caf\xe9"}', "not-utf8"),
    "utf-16 line": ('{"text": "a"}'.encode("utf-16"), "not-utf8"),
    "utf-16 file": ('{"text": "a\u0416"}'.encode("utf-16")[:6].replace(b"\0", b"x"), "not-utf8"),
    "surrogate in utf-8": (b'{"text": "\xed\xa0\x80"}', "not-utf8"),
    "cut in the middle": (b'{"text": "abc', "bad-json"),
    "single quotes": (b"{'text': 'abc'}", "bad-json"),
    "trailing comma": (b'{"text": "abc",}', "bad-json"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "bad-json"),
    "bare word": (b"hello", "bad-json"),
    "raw control character": (b'{"text": "a\x01b"}', "bad-json"),
    "bad escape": (b'{"text": "\\x41"}', "bad-json"),
    "endless nesting": (b"[" * 100_000, "bad-json"),
    "number out of range": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "bad-json"),
    "second byte-order mark": (b'\xef\xbb\xbf{"text": "a"}', "bad-json"),
    "list": ([1, 2], "not-an-object"),
    "number": (5, "not-an-object"),
    "null": (None, "not-an-object"),
    "string": ("text", "not-an-object"),
    "high half alone": (b'{"text": "\\ud83d"}', "lone-surrogate"),
    "low half alone": (b'{"text": "\\ude00"}', "lone-surrogate"),
    "low half in a key": (b'{"text": "a", "\\ude00": 1}', "lone-surrogate"),
    "escaped NUL": (b'{"text": "a\\u0000b"}', "nul-character"),
    "not a number": (b'{"text": "a", "score": NaN}', "bad-json"),
    "infinite number": (b'{"text": "a", "deep": [{"n": -Infinity}]}', "bad-json"),
    "number too large": (b'{"text": "a", "deep": [{"n": -1e999}]}', "bad-json"),
    "number of many digits": (b'{"text": "a", "n": ' + b"9" * 400 + b".5}", "bad-json"),
    "number too large in tools as text": (chat("a", "b", tools='[{"max": 1e999}]'), "bad-json"),
    "raw NUL": (b'{"text": "a\0b"}', "nul-character"),
    "NUL in a turn": (chat("a\0", "b"), "nul-character"),
    "repeated key": (b'{"text": "a", "text": "b"}', "duplicate-key"),
    "repeated key after an escape": (b'{"text": "a\\"b", "text": "c\\\\"}', "duplicate-key"),
    "repeated key, equal values": (b'{"text": "a", "text": "a"}', "duplicate-key"),
    "repeated role": (
        b'{"messages": [{"role": "user", "content": "a"}, '
        b'{"role": "user", "role": "assistant", "content": "b"}]}',
        "duplicate-key",
    ),
    "repeated key in an extra": (b'{"text": "a", "m": {"k": 1, "k": 2}}', "duplicate-key"),
    "no field": ({}, "unknown-format"),
    "other fields": ({"inquiry": "a", "reply": "b"}, "unknown-format"),
    "prompt alone": ({"prompt": "a"}, "missing-field"),
    "completion alone": ({"completion": "a"}, "missing-field"),
    "turn without content": (
        {"messages": [{"role": "user"}, turn("assistant", "b")]},
        "missing-field",
    ),
    "turn without role": ({"messages": [{"content": "a"}]}, "missing-field"),
    "null prompt": ({"prompt": None, "completion": "b"}, "null-field"),
    "null text": ({"text": None}, "null-field"),
    "null messages": ({"messages": None}, "null-field"),
    "null answer": (chat("a", None), "null-field"),
    "null turn": ({"messages": [None]}, "null-field"),
    "number as completion": ({"prompt": "a", "completion": 5}, "wrong-type"),
    "list as text": ({"text": ["a"]}, "wrong-type"),
    "string as messages": ({"messages": "user: a"}, "wrong-type"),
    "string as turn": ({"messages": ["a", "b"]}, "wrong-type"),
    "part of an image": (chat("a", [{"type": "image_url", "image_url": "b"}]), "wrong-type"),
    "number as role": ({"messages": [turn(5, "a")]}, "wrong-type"),
    "unknown role": (talk("user", "bot"), "unknown-role"),
    "role in capitals": (talk("User", "assistant"), "unknown-role"),
    "developer": (talk("developer", "user", "assistant"), "unknown-role"),
    "messages as Python writes them": ({"messages": str([turn("user", "a")])}, "bad-json"),
    "tools as text that is cut off": (chat("a", "b", tools=json.dumps([TOOL])[:-1]), "bad-json"),
    "tools as words": (chat("a", "b", tools="a tool"), "malformed-tools"),
    "tools as object": (chat("a", "b", tools=TOOL), "malformed-tools"),
    "tool without a name": (chat("a", "b", tools=[{"type": "function"}]), "malformed-tools"),
    "tool of null": (chat("a", "b", tools=[None]), "malformed-tools"),
    "call as text": (asked(turn("assistant", "", tool_calls="f()")), "malformed-tool-calls"),
    "call without a name": (
        asked(turn("assistant", "", tool_calls=[{"id": "1"}])),
        "malformed-tool-calls",
    ),
    "blank question": (chat(" \n", "b"), "blank-field"),
    "blank answer": (chat("a", ""), "blank-field"),
    "blank answer, Unicode space": (chat("a", "\u2003"), "blank-field"),
    "text among chats": ({"text": "a"}, "mixed-format"),
    "completion among chats": ({"prompt": "a", "completion": "b"}, "mixed-format"),
    "fraction as a weight": (asked(turn("assistant", "b", weight=0.5)), "bad-mark"),
    "word as a weight": (chat("a", "b", weight="heavy"), "bad-mark"),
    "loss mask of another length": (chat("a", "b", loss_mask=[1, 1, 1]), "bad-mark"),
    "row of weight 0": (chat("a", "b", weight=0), "nothing-to-learn"),
    "completion not to be trained on": (
        {"prompt": "a", "completion": "b", "train": False},
        "nothing-to-learn",
    ),
    "text not to be trained on": ({"text": "a", "trainable": "False"}, "nothing-to-learn"),
    "no answer to be learnt": (asked(turn("assistant", "b", loss=False)), "nothing-to-learn"),
    "answer marked as bad": ({"prompt": "a", "completion": "b", "label": False}, "preference-pair"),
    "no turns": (talk(), "no-assistant-turn"),
    "question only": (talk("user"), "no-assistant-turn"),
    "question last": (talk("user", "assistant", "user"), "last-turn-not-assistant"),
    "system last": (talk("user", "assistant", "system"), "last-turn-not-assistant"),
    "result last": (asked(CALLING, turn("tool", "1", tool_call_id="1")), "last-turn-not-assistant"),
    "answer first": (talk("assistant", "user", "assistant"), "role-order"),
    "system twice": (talk("system", "system", "user", "assistant"), "role-order"),
    "system in between": (talk("user", "system", "assistant"), "role-order"),
    "two questions": (talk("user", "user", "assistant"), "role-order"),
    "two answers": (talk("user", "assistant", "assistant"), "role-order"),
    "call without its result": (asked(CALLING, turn("assistant", "b")), "role-order"),
    "result without a call": (talk("user", "tool", "assistant"), "tool-without-call"),
    "result of another call": (
        asked(CALLING, turn("tool", "1", tool_call_id="2"), turn("assistant", "b")),
        "tool-without-call",
    ),
}
ALSO = {"system last": "role-order"}  # what is wrong twice is said twice


@pytest.fixture(scope="module")
def checks_of_lines(tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, list[str]]:
    """The errors of a file that holds all bad lines, by line: the first good ones give its format.

    The bad lines stand between good ones, all of which are different examples.
    """
    good = [chat(f"Where is {number}?", f"In {number}land.") for number in range(len(BAD_LINES))]
    lines = [*GOOD * 20, *chain(*zip(good, (line for line, _ in BAD_LINES.values()), strict=True))]
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "train.jsonl", lines)
    write_lines(folder / "valid.jsonl", HELD_OUT)
    checks: defaultdict[int | None, list[str]] = defaultdict(list)
    for file, line, check in errors_in(folder):
        assert file == "train.jsonl"
        checks[line].append(check)
    return dict(checks)


def line_of(name: str) -> int:
    """Where a bad line stands in that file."""
    return 20 * len(GOOD) + 2 * (list(BAD_LINES).index(name) + 1)


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_with_its_file_its_number_and_its_check(name, checks_of_lines) -> None:
    expected = [BAD_LINES[name][1]] + ([ALSO[name]] if name in ALSO else [])
    assert checks_of_lines[line_of(name)] == expected


def test_all_bad_lines_are_reported_at_once_and_no_others(checks_of_lines) -> None:
    assert set(checks_of_lines) == set(map(line_of, BAD_LINES))


GOOD_LINES: dict[str, Any] = {
    "system": talk("system", "user", "assistant"),
    "blank system": {"messages": [turn("system", ""), turn("user", "a"), turn("assistant", "b")]},
    "logged loss": chat("a", "logged", loss=0.0),
    "logged loss of a turn": asked(turn("assistant", "logged too", loss=0.31)),
    "marks that say yes": asked(turn("assistant", "yes", weight=1.0, train=True, loss=None)),
    "large numbers": chat("a", "large", score=1e308, count=10**400),
    "messages and tools as text": {
        "messages": json.dumps([turn("user", "as text"), turn("assistant", "b")]),
        "tools": json.dumps([TOOL]),
    },
    "several turns": talk("user", "assistant", "user", "assistant"),
    "null tools": chat("a", "b", tools=None),
    "bare tool": chat("a", "b", tools=[{"name": "f", "parameters": {}}]),
    "ends with a call": asked(CALLING) | {"tools": [TOOL]},
    "call without content": asked({"role": "assistant", "tool_calls": [CALL]}),
    "two results": asked(
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL | {"id": "2"}]},
        turn("tool", "", tool_call_id="2"),
        turn("tool", "1", tool_call_id="1"),
        turn("assistant", "b"),
    ),
    "result without ids": asked(CALLING, turn("tool", "1"), turn("assistant", "b")),
    "quotes and backslashes": chat('a "b" \\', '"\\\\"\\" : "text": "'),
    "escaped text of a NUL": chat("a \\u0000", "b"),
    "names of numbers that are none": chat('"NaN, \\', "-Infinity", score=None),
    "emoji, escaped": chat("\U0001f600", "b"),
    "spaces around": b'  {"messages": [{"role":"user","content":"a"},'
    b'{"content":"b" , "role" :\t"assistant"}]} \r',
}


def test_unusual_but_sound_lines_are_accepted(write_data: WriteData) -> None:
    assert errors_in(write_data(train=[*GOOD, *GOOD_LINES.values()], valid=HELD_OUT)) == []


def test_fields_are_read_by_their_configured_keys(write_data: WriteData) -> None:
    lines = [{"q": "a", "a": "b"}, {"q": "a", "a": 5}, {"q": " ", "a": "c"}]
    folder = write_data(train=lines, valid=[{"q": "y", "a": "z"}])
    found = errors_in(folder, prompt_feature="q", completion_feature="a", batch_size=1)
    assert found == [("train.jsonl", 2, "wrong-type"), ("train.jsonl", 3, "blank-field")]


COLUMNS = {
    '{"text": "ÄÖÜ" x}': "column 16: expected `,` or `}`",
    '{"text": "ÄÖÜ", "n": NaN}': "column 22: NaN is no JSON number",
    "\u0085": "column 1: expected value",
    '{"text": "a",\u2028"b": 1}': "column 14: key must be a string",
    "\ufeff{}": "column 1: expected value",
    '{"text": "Ä': "column 11: EOF while parsing a string",
}


def test_the_message_gives_the_column_in_characters(write_data: WriteData) -> None:
    folder = write_data(train=[*GOOD, *(line.encode() for line in COLUMNS)], valid=HELD_OUT)
    report, _ = load(folder)
    messages = [f"not valid JSON at {column}" for column in COLUMNS.values()]
    assert [error.message for error in report.errors] == messages
