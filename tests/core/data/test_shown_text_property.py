"""Random rows in five chat templates: each text is in the tokens, or it is reported."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from nested_core.data.data_settings import Targets
from nested_core.data.lines.example_parsing import FieldNames, parse_line
from nested_core.data.tokens.example_encoding import EncodedExample, encode_example
from tests.builders.called_rows import FAMILIES, CalledRow, draw_called_row
from tests.core.data.conftest import build_tokenizer

MANY = [pytest.param(100, marks=pytest.mark.reliability, id="many")]


@pytest.mark.parametrize("draws", [pytest.param(20, id="some"), *MANY])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_text_is_in_the_tokens_or_reported_and_only_learnt_turns_are_learnt(
    family: str, draws: int
) -> None:
    template, special = FAMILIES[family]
    tokenizer = build_tokenizer(template, special).load()
    dice = random.Random(f"{family} {draws}")
    for _ in range(draws):
        drawn = draw_called_row(dice, special)
        targets: Targets = dice.choice(("last", "all", "whole"))
        example = parse_line(drawn.line, FieldNames())
        if family == "raises" and drawn.row["messages"][0]["role"] == "system":
            with pytest.raises(Exception, match="System role not supported"):
                encode_example(example, tokenizer, targets)
            continue
        encoded = encode_example(example, tokenizer, targets)
        other = parse_line(json.dumps(with_other_arguments(drawn.row)).encode(), FieldNames())
        in_other_form = encode_example(other, tokenizer, targets).tokens
        if family != "raises":  # where the text of arguments stays as it is
            assert in_other_form == encoded.tokens, drawn
        require_reports_of_missing_texts(drawn, encoded, tokenizer, targets)
        require_reports_of_control_tokens(drawn, encoded, tokenizer, special[0])
        if encoded.broken_turn < 0 and targets != "whole":
            require_learnt_texts(drawn, encoded, tokenizer, targets)


def with_other_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """The row with objects in place of the JSON texts of arguments, and the other way round."""
    changed: dict[str, Any] = json.loads(json.dumps(row))
    for turn in changed["messages"]:
        for call in turn.get("tool_calls", ()):
            value = call["function"]["arguments"]
            other = json.loads(value) if isinstance(value, str) else json.dumps(value)
            call["function"]["arguments"] = other
    return changed


def require_reports_of_missing_texts(
    drawn: CalledRow, encoded: EncodedExample, tokenizer: Any, targets: Targets
) -> None:
    if encoded.broken_turn >= 0:  # the row is refused for another reason
        return
    shown = tokenizer.decode(encoded.tokens)
    missing = {place for word, place in drawn.words.items() if word not in shown}
    expected = {(describe(drawn, place, targets), place[1]) for place in missing}
    reported = [note for note in encoded.notes if note.check == "unread-field"]
    for severity, key in expected:
        assert any(n.severity == severity and key in n.message for n in reported), (drawn, key)
    assert all("the chat template does not show it" in note.message for note in reported)
    named = {severity for severity, _ in expected}
    assert {note.severity for note in reported} == named, drawn


def describe(drawn: CalledRow, place: tuple[int | None, str], targets: Targets) -> str:
    """The severity of a text that is missing."""
    turn, key = place
    turns = drawn.row["messages"]
    if turn is None or key == "name" or turns[turn]["role"] != "assistant":
        return "warning"
    is_last = turn == len(turns) - 1
    thinks = key in ("reasoning_content", "thinking")
    return (
        "error"
        if is_last or (targets != "last" and not (thinks and targets == "whole"))
        else ("warning")
    )


def require_reports_of_control_tokens(
    drawn: CalledRow, encoded: EncodedExample, tokenizer: Any, end: str
) -> None:
    reported = [n.message for n in encoded.notes if n.check.endswith("control-token")]
    for token in drawn.tokens:
        assert any(message.startswith(f"{token} ") for message in reported), (drawn, token)
    assert bool(reported) == bool(drawn.tokens), drawn
    answer = drawn.row["messages"][-1]["content"]
    if answer.rstrip().endswith(end):  # it is learnt once
        assert "".join(tokenizer.decode(encoded.tokens).split())[-2 * len(end) :] != end * 2


def require_learnt_texts(
    drawn: CalledRow, encoded: EncodedExample, tokenizer: Any, targets: Targets
) -> None:
    learnt = "".join(tokenizer.decode(encoded.tokens[begin:end]) for begin, end in encoded.spans)
    shown = tokenizer.decode(encoded.tokens)
    turns = drawn.row["messages"]
    for word, (turn, _) in drawn.words.items():
        is_last = turn == len(turns) - 1
        is_marked = turn is not None and (
            is_last or (targets == "all" and turns[turn]["role"] == "assistant")
        )
        assert (word in learnt) == (is_marked and word in shown), (drawn, word)
