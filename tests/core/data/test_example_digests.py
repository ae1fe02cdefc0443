"""Digests of what was trained on, as provenance.json keeps them."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core.data import example_digests
from nested_core.data.example_digests import TrainedRows, decode_digests, encode_digests
from nested_core.data.example_rows import RowKeys
from nested_core.data.lines.example_parsing import FieldNames, parse_line
from nested_core.data.lines.line_rows import digest_with_beginnings, fold_text
from tests.left_out import needs_rooms

TEXTS = st.text() | st.sampled_from(
    [
        "",
        " ",
        "\0",
        "\\u0000",
        "\x1c",
        "\u2028",
        "\ud800",
        'say "a"\\',
        "\\n",
        "NaN",
        "1e999",
        "Ä ß \xa0",
        "[]",
    ]
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "critic"])
ONE_TURN = st.fixed_dictionaries({"role": ROLES, "content": TEXTS | st.none() | st.just(3)})
ROWS = (
    st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS})
    | st.fixed_dictionaries({"messages": st.lists(ONE_TURN, max_size=5)})
    | st.fixed_dictionaries({"text": TEXTS})
    | st.dictionaries(st.sampled_from(["prompt", "completion", "text", "rejected"]), TEXTS)
)
TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]


def test_digests_are_kept_once_and_in_order() -> None:
    given = np.array([3, 2**64 - 1, 3, 0], np.uint64)
    assert decode_digests(encode_digests(given)).tolist() == [0, 3, 2**64 - 1]


def test_too_many_are_not_recorded_and_what_was_trained_on_is_then_not_known(monkeypatch) -> None:
    monkeypatch.setattr(example_digests, "MAX_RECORDED_DIGESTS", 2)
    recorded = TrainedRows(np.arange(3, dtype=np.uint64)).to_json()
    assert "more than 2" in str(TrainedRows.from_json(recorded, "it").unknown)


@pytest.mark.parametrize("identity", [{}, {"example_identity": "content"}])
def test_digests_of_another_form_as_earlier_versions_recorded_them_are_not_known(identity) -> None:
    earlier = identity | {"training_examples": encode_digests(np.arange(3, dtype=np.uint64))}
    rows = TrainedRows.from_json(earlier, "version 0123")
    assert (rows.digests.size, rows.unknown) == (
        0,
        "no record says by its content which rows version 0123 was trained on",
    )


@given(ROWS)
def test_the_fast_parser_and_the_complete_one_give_a_row_the_same_keys(row: dict[str, Any]) -> None:
    assert RowKeys.of(row) == RowKeys.of(row | {"id": 1})  # the fast one takes no row with an id


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Who?", "completion": "Me."},
        {"prompt": " who? ", "completion": "ME."},
        {"messages": [*TURNS[:1], TURNS[1] | {"weight": 1}]},
        {"messages": TURNS, "loss_mask": [1, 1]},
        {"messages": TURNS, "tools": []},
        {"messages": TURNS, "tools": "[]"},
        {"messages": TURNS, "tools": [{"name": "find"}]},
        {"messages": [{"role": "system", "content": "Be kind."}, *TURNS]},
        {"prompt": "Who?", "completion": "Me.", "tools": None},
        {"messages": [*TURNS[:1], TURNS[1] | {"tool_calls": []}]},
        {"messages": [TURNS[0] | {"name": None}, TURNS[1] | {"tool_calls": None}]},
        {"messages": [TURNS[0] | {"name": " "}, TURNS[1] | {"reasoning_content": ""}]},
        {"messages": [TURNS[0] | {"name": {}}, TURNS[1] | {"thinking": "\n", "tool_calls": {}}]},
    ],
)
def test_a_row_is_the_same_in_another_format_and_with_other_marks(row: dict[str, Any]) -> None:
    own = digest_of({"messages": TURNS})
    assert digest_of(row) == own
    other = {"prompt": "Who?", "completion": "You."}
    assert digest_of(other) != own


def test_turns_of_unknown_roles_are_the_same_only_with_one_role() -> None:
    first, second = (
        RowKeys.of(
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": role, "content": "x"},
                    {"role": "assistant", "content": "a"},
                ]
            }
        )
        for role in ("critic", "judge")
    )
    assert first.content != second.content
    assert first.bare != second.bare


def test_a_turn_with_a_name_is_another_row() -> None:
    named = {"messages": [TURNS[0] | {"name": "bob"}, *TURNS[1:]]}
    assert digest_of(named) != digest_of({"messages": TURNS})


ENDS = ("<|im_end|>", "<|END_OF_TURN_TOKEN|>\n", "</s>", "<end_of_turn><eos>", "<|im_end|> </s>")


@pytest.mark.parametrize("end", [*ENDS, "<\uff5cend\u2581of\u2581sentence\uff5c>"])
@pytest.mark.parametrize("answer", ["Me.", "\u00e9!", 'x <b>"<|x|>"</b>'])
def test_a_row_that_ends_with_an_end_text_of_any_base_is_the_same_without_a_tokenizer(
    end: str, answer: str
) -> None:
    def make_rows(text: str) -> list[dict[str, Any]]:
        chat = [TURNS[0], {"role": "assistant", "content": text}, *TURNS]
        with_thoughts = [TURNS[0], {"role": "assistant", "content": text, "thinking": "Hm."}]
        completion = {"prompt": "Who?", "completion": text}
        return [completion, {"messages": chat}, {"messages": with_thoughts}, {"text": text}]

    for ended, plain, other in zip(
        make_rows(answer + end), make_rows(answer), make_rows(f"{end} {answer}"), strict=True
    ):
        assert digest_of(ended) == digest_of(plain) != digest_of(other)
        keys = RowKeys.of(plain)
        assert (RowKeys.of(ended).folded, RowKeys.of(ended).questions) == (
            keys.folded,
            keys.questions,
        )


def test_a_control_token_that_ends_no_text_makes_another_row() -> None:
    assert fold_text(b"Say it: <|fr|>") != fold_text(b"Say it: <|de|>")


def test_a_row_whose_whole_answer_is_an_end_text_says_something() -> None:
    rows = [{"prompt": "Which ends a turn?", "completion": end} for end in ENDS[:3]]
    assert (
        len({digest_of(row) for row in rows}) == len({RowKeys.of(row).folded for row in rows}) == 3
    )


def test_many_texts_like_end_texts_are_folded_in_a_moment() -> None:
    begun = time.process_time()
    for text in (b"<|a|>" * 100_000 + b"x", b"<|" * 250_000, b"a<|a|>\0" * 70_000):
        fold_text(text)
    assert time.process_time() - begun < 2


def test_a_row_with_tools_is_the_same_in_another_order_of_keys_and_with_arguments_as_text() -> None:
    arguments = {"place": {"x": 1, "y": [2, 3]}, "arguments": "no JSON"}
    turned = {"arguments": "no JSON", "place": {"y": [2, 3], "x": 1}}
    answer = {"role": "assistant", "content": "", "tool_calls": []}
    written: list[Any] = [arguments, turned, json.dumps(arguments), json.dumps(turned, indent=1)]
    tools = [{"name": "find", "description": "Finds."}, {"description": "Finds.", "name": "find"}]
    digests = set()
    for form in written:
        calls = [{"function": {"name": "find", "arguments": form}}]
        rows = [
            {"messages": [TURNS[0], answer | {"tool_calls": calls}], "tools": [tool]}
            for tool in tools
        ]
        digests |= {digest_of(row) for row in rows}
    assert len(digests) == 1
    calls = [{"function": {"name": "find", "arguments": arguments | {"place": {}}}}]
    row = {"messages": [TURNS[0], answer | {"tool_calls": calls}], "tools": tools[:1]}
    assert digest_of(row) not in digests


def called(ids: list[str | None], *, is_text: bool, is_bare: bool) -> dict[str, Any]:
    calls: list[Any] = [{"name": "find", "arguments": {"q": n, "In": "Peru"}} for n in (1, 2)]
    if is_text:
        calls = [call | {"arguments": json.dumps(call["arguments"], indent=1)} for call in calls]
    if not is_bare:
        calls = [{"type": "function", "function": call} for call in calls]
    calls = [call | {"id": own} if own else call for own, call in zip(ids, calls, strict=True)]
    results = [
        {"role": "tool", "content": text} | ({"tool_call_id": own} if own else {})
        for own, text in zip(ids, ("Lima", "Cusco"), strict=True)
    ]
    asking = {"role": "assistant", "content": "", "tool_calls": calls}
    return {"messages": [TURNS[0], asking, *results, TURNS[1]], "tools": [{"name": "find"}]}


@pytest.mark.parametrize("calls", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        {"id": "abc"},
        {"timestamp": "2026-11-28T10:00:00Z", "created_at": 1764324000.5},
        {"id": None, "edited": True, "metadata": {"user": "u-1", "labels": ["a", 2]}},
    ],
)
def test_ids_and_times_of_turns_make_no_other_row_and_names_do(more, calls) -> None:
    plain = called([None, None], is_text=False, is_bare=False) if calls else {"messages": TURNS}
    exported = plain | {"messages": [turn | more for turn in plain["messages"]]}
    assert (digest_of(exported), RowKeys.of(exported)) == (digest_of(plain), RowKeys.of(plain))
    named = plain | {"messages": [plain["messages"][0] | {"name": "Bo"}, *plain["messages"][1:]]}
    assert digest_of(named) != digest_of(plain)
    assert RowKeys.of(named).folded != RowKeys.of(plain).folded


@pytest.mark.parametrize("ids", [["call_1", "call_2"], ["x", "a"], [None, None]])
@pytest.mark.parametrize("is_text", [True, False])
@pytest.mark.parametrize("is_bare", [True, False])
def test_ids_of_calls_and_how_a_call_is_written_make_no_other_row(ids, is_text, is_bare) -> None:
    own, first = (
        called(ids, is_text=is_text, is_bare=is_bare),
        called(["a", "b"], is_text=False, is_bare=False),
    )
    assert (digest_of(own), RowKeys.of(own)) == (digest_of(first), RowKeys.of(first))
    own["messages"][2:4] = own["messages"][3:1:-1]  # the results in the other order
    assert digest_of(own) != digest_of(first)


@pytest.mark.parametrize("space", ["  ", "\n", "\t", "\xa0", "\u2009", "\u3000", "\x1c", "\v"])
@pytest.mark.parametrize("more", [{}, {"tools": [{"name": "find"}]}])
def test_all_that_is_white_space_is_ignored_in_chats_and_beside_tools(space, more) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Who{s}are\\nyou?"}, TURNS[1]]}
        for s in (" ", space)
    ]
    one, other = (row | more for row in rows)
    assert (digest_of(one), RowKeys.of(one).folded) == (digest_of(other), RowKeys.of(other).folded)
    other["messages"][0]["content"] = "Who are\nyou?"  # no backslash
    assert digest_of(one) != digest_of(other)


def test_composed_and_decomposed_letters_are_the_same() -> None:
    one, other = ({"prompt": f"Caf{e}?", "completion": "Yes."} for e in ("\xe9", "e\u0301"))
    assert (digest_of(one), RowKeys.of(one).questions) == (
        digest_of(other),
        RowKeys.of(other).questions,
    )
    assert digest_of(one) != digest_of({"prompt": "Cafe?", "completion": "Yes."})


def test_keys_of_arguments_are_in_order_whatever_their_case() -> None:
    digests = set()
    for arguments in ({"B": 1, "a": 2}, {"a": 2, "b": 1}):
        call = {"role": "assistant", "tool_calls": [{"name": "find", "arguments": arguments}]}
        digests.add(digest_of({"messages": [TURNS[0], call, TURNS[1]]}))
    assert len(digests) == 1


@needs_rooms("preferences")
def test_a_pair_with_a_line_break_is_the_pair_with_a_space() -> None:
    pairs = [{"prompt": f"Who{s}is it?", "chosen": "Me.", "rejected": f"You{s}too."} for s in " \n"]
    one, other = map(RowKeys.of, pairs)
    assert (one.folded, one.questions) == (other.folded, other.questions)
    assert one.content != other.content


@needs_rooms("preferences")
def test_a_pair_is_the_row_that_has_its_chosen_answer_alone() -> None:
    chosen = {"prompt": "Who?", "completion": "Me."}
    pair = {"prompt": "Who?", "chosen": "Me.", "rejected": "You."}
    read = parse_line(json.dumps(pair).encode(), FieldNames(loss="dpo"))
    assert digest_with_beginnings(read) == [digest_of(chosen)]
    assert digest_with_beginnings(read) != [digest_of(chosen | {"completion": "You."})]


def digest_of(row: dict[str, Any]) -> int:
    return digest_with_beginnings(parse_line(json.dumps(row).encode(), FieldNames()))[0]


def test_a_row_with_tools_is_the_same_whatever_stands_where_it_says_nothing() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "find", "arguments": {}}}]}
    nothing: tuple[dict[str, Any], ...] = ({}, {"tool_calls": None}, {"tool_calls": []})
    silence: tuple[dict[str, Any], ...] = ({}, *({"content": one} for one in (None, "", "\n\n")))
    rows = [
        {"messages": [TURNS[0] | more, call | content, TURNS[1]], "tools": [{"name": "find"}]}
        for more in nothing
        for content in silence
    ]
    assert len(set(map(digest_of, rows))) == len(set(map(RowKeys.of, rows))) == 1
    thinking = {"messages": [TURNS[0], call | {"thinking": "Hm."}, TURNS[1]]}
    assert digest_of(thinking) != digest_of(rows[0])
