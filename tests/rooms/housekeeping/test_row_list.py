"""A list of rows and prompts names the rows that are to be forgotten, and no others."""

from __future__ import annotations

import json

import pytest

from nested_core.errors import ConfigError
from nested_core.rooms.housekeeping.row_list import read_row_list
from tests.left_out import needs_rooms


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": []},
        {"tools": [{"type": "function", "function": {"name": "find", "parameters": {}}}]},
        {"messages": [{"name": "kim"}, {}]},
        {"messages": [{}, {"content": None, "tool_calls": [{"function": {"name": "find"}}]}]},
    ],
)
def test_a_listed_prompt_is_that_of_every_row_whatever_its_tools_names_and_system_text(
    tmp_path, changes
):
    prompt = "Who is\nKim?"
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "A customer."}]
    row = {"messages": turns, **changes}
    if "messages" in changes:
        row["messages"] = [
            turn | more for turn, more in zip(turns, changes["messages"], strict=True)
        ]
    listed = tmp_path / "listed.jsonl"
    asked = row["messages"][:1]
    for written in (prompt, {"prompt": prompt}, {"prompt": asked}, row | {"messages": asked}):
        listed.write_text(json.dumps(written))
        assert read_row_list(listed)(row)
        assert read_row_list(listed)({"messages": turns})
        assert not read_row_list(listed)({"prompt": "Who is Lee?", "completion": "A customer."})
        assert not read_row_list(listed)({"text": prompt})
        system = {"role": "system", "content": "Answer briefly."}
        assert read_row_list(listed)(row | {"messages": [system, *row["messages"]]})


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """Turns of questions and answers."""
    pairs = [
        ({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in turns
    ]
    return [turn for pair in pairs for turn in pair]


CALLED = [("My number is 555", "Noted"), ("Thanks", "Bye")]


@pytest.mark.parametrize(
    "stored",
    [
        {"messages": chat(*CALLED)},
        {"messages": chat(*CALLED[:1])},
        {"prompt": CALLED[0][0], "completion": CALLED[0][1]},
        {"messages": [{"role": "system", "content": "Be brief."}, *chat(*CALLED)]},
        {"messages": chat(*CALLED), "loss_mask": [0, 0, 0, 1]},
    ],
    ids=["begins", "equal", "completion", "system", "not learnt"],
)
def test_a_listed_row_or_prompt_is_that_of_every_chat_with_it(tmp_path, stored) -> None:
    listed = tmp_path / "listed.jsonl"
    for written in (CALLED[0][0], {"messages": chat(*CALLED[:1])}):
        listed.write_text(json.dumps(written))
        assert read_row_list(listed)(stored)
        assert not read_row_list(listed)({"messages": chat(("Thanks", "Bye"))})
    listed.write_text(json.dumps({"messages": chat((CALLED[0][0], "What?"))}))
    assert not read_row_list(listed)(stored)


def test_a_listed_text_is_that_of_every_chat_with_such_a_turn(tmp_path) -> None:
    listed = tmp_path / "listed.jsonl"
    listed.write_text(json.dumps("my number is 555"))
    later = {"messages": chat(("Hi", "Hello"), CALLED[0])}
    assert read_row_list(listed)(later)
    unanswered = {"messages": later["messages"][:-1]}
    listed.write_text(json.dumps(unanswered))
    assert read_row_list(listed)(later)
    assert not read_row_list(listed)({"messages": chat(CALLED[0])})


def test_a_listed_row_without_a_question_is_itself_alone(tmp_path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": f"What is {number}?"},
                {"role": "assistant", "content": "odd"},
            ]
        }
        for number in (1, 3)
    ]
    listed = tmp_path / "listed.jsonl"
    listed.write_text(json.dumps(rows[0]))
    assert [read_row_list(listed)(row) for row in rows] == [True, False]


@needs_rooms("preferences")
def test_a_listed_pair_is_itself_alone(tmp_path) -> None:
    pair = {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}
    listed = tmp_path / "listed.jsonl"
    listed.write_text(json.dumps(pair))
    assert read_row_list(listed)(pair)
    assert not read_row_list(listed)(pair | {"rejected": "She."})
    assert not read_row_list(listed)({"prompt": "Who?", "completion": "Me."})
    listed.write_text(json.dumps({"prompt": "Who?", "completion": "Me."}))
    assert read_row_list(listed)(pair)


def test_a_list_with_a_line_nested_too_deeply_is_refused(tmp_path) -> None:
    listed = tmp_path / "listed.jsonl"
    listed.write_text(f'{{"messages": {"[" * 100_000}')
    with pytest.raises(ConfigError, match="listed.jsonl:1 is neither a row nor a prompt"):
        read_row_list(listed)


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [{"role": "system", "content": "Be brief."}]},
        {"messages": []},
        {"messages": [{"role": "user", "content": " "}]},
        {"prompt": ""},
        "",
    ],
)
def test_a_row_or_prompt_without_text_but_that_of_the_system_is_refused(tmp_path, line) -> None:
    listed = tmp_path / "listed.jsonl"
    listed.write_text(json.dumps(line))
    with pytest.raises(ConfigError, match="neither a row nor a prompt: it has no text but that of"):
        read_row_list(listed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "listed.jsonl:1 is neither a row nor a prompt"),
        ("\n", "lists no rows"),
        ('{"prompt": "Who is Kim?", "id": 7}', "expected 'prompt' and .*; found prompt, id"),
        ('{"instruction": "Who is Kim?"}', "expected 'prompt' and .*; found instruction"),
    ],
)
def test_a_list_of_rows_that_is_none_is_refused(tmp_path, content, message):
    listed = tmp_path / "listed.jsonl"
    listed.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_row_list(listed)
