"""Rows with marks, as hypothesis draws them: what is marked as learnt is learnt, and nothing else.

Under `supervise: all`, in rows of several formats and under several chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings

from nested_core.data.lines.example_parsing import FieldNames, parse_line
from nested_core.data.lines.json_decoding import LineProblem
from nested_core.data.tokens.example_encoding import encode_example
from tests.builders.marked_rows import MarkedRow, marked_rows
from tests.core.data.conftest import TEMPLATE, build_tokenizer
from tests.core.data.test_supervise_all import HEADED, PLAIN, STRIPPING, UNHEADED

# What each template writes after an answer, and what becomes of the answer's text in it.
TEMPLATES: dict[str, tuple[str, str, Callable[[str], str]]] = {
    "plain turns": (TEMPLATE, "<|end|>", str),
    "a header, and line ends": (HEADED, "<|end|>\n", str),
    "no roles": (UNHEADED, "<|end|>", str),
    "stripped texts": (STRIPPING, "<|end|>", str.strip),
    "no special tokens": (PLAIN, "\n", lambda text: f" {text}"),
}
tokenizer_of = cache(build_tokenizer)


def check_what_is_learnt(name: str, drawn: MarkedRow) -> None:
    """See that the supervised tokens are the answers that the row lets learn, each to its end."""
    template, end, change = TEMPLATES[name]
    tokenizer = tokenizer_of(template).load()
    line = json.dumps(drawn.row).encode()
    if not drawn.learnt:
        with pytest.raises(LineProblem) as refused:
            parse_line(line, FieldNames())
        assert refused.value.check == "nothing-to-learn"
        return
    encoded = encode_example(parse_line(line, FieldNames()), tokenizer, "all")
    if encoded.broken_turn >= 0:  # refused: a token may reach over the end of a turn
        assert name == "no special tokens"
        return
    learnt = [tokenizer.decode(encoded.tokens[begin:stop]) for begin, stop in encoded.spans]
    assert learnt == [change(text) + end for text in drawn.learnt]


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=10)
@given(marked_rows())
def test_what_is_marked_as_learnt_is_learnt_and_nothing_else(template, drawn) -> None:
    check_what_is_learnt(template, drawn)


@pytest.mark.reliability
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=500)
@given(marked_rows())
def test_it_is_so_in_five_hundred_draws(template: str, drawn: MarkedRow) -> None:
    check_what_is_learnt(template, drawn)
