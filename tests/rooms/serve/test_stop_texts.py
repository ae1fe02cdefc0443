"""Stop texts: an answer ends before the first of them, wherever its tokens begin and end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer

from nested_core.models.generation import find_stop
from nested_core.rooms.serve.stop_texts import AnswerText
from tests.example import MODEL
from tests.rooms.serve.versions import NAME, Client

pytestmark = pytest.mark.slow("serves and streams whole answers")

TEXTS = st.text("abc ", max_size=12)
STOPS = st.lists(st.text("abc ", min_size=1, max_size=4), min_size=1, max_size=3)


def read_stream(client: Client, **body: Any) -> tuple[str, str, int]:
    """Text, finish reason and number of tokens of a streamed answer."""
    reply = client.chat(NAME, stream=True, stream_options={"include_usage": True}, **body)
    lines = [line[6:] for line in reply.body.splitlines() if line.startswith("data: {")]
    *pieces, usage = map(json.loads, lines)
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    reason = pieces[-1]["choices"][0]["finish_reason"]
    return text, reason, usage["usage"]["completion_tokens"]


@pytest.mark.parametrize("more", [{}, {"seed": 1}], ids=["in a batch", "by itself"])
def test_an_answer_ends_before_the_first_stop_text_whole_and_streamed(client, base, more) -> None:
    tokenizer: Any = load_tokenizer(base)
    answer = client.chat(NAME, logprobs=True, **more).json()["choices"][0]
    whole = answer["message"]["content"]
    tokens = [token["id"] for token in answer["logprobs"]["content"]]
    for stops in (
        [whole[4:8]],
        [whole[5:8]],
        [whole[2:6]],
        [whole[3:4]],
        [whole[:3]],
        [whole[-2:]],
        [whole[9:12], whole[5:7]],
        [whole[6:7], whole[4:9]],  # the second begins first, and is complete later
    ):
        end = min(whole.index(stop) for stop in stops)
        last = max(end + len(stop) for stop in stops if whole.index(stop) == end)
        needed = next(n for n in range(13) if len(tokenizer.decode(tokens[:n]).strip()) >= last)
        reply = client.chat(NAME, stop=stops, logprobs=True, **more).json()
        (choice,) = reply["choices"]
        assert (choice["message"]["content"] or "") == whole[:end]
        assert choice["finish_reason"] == "stop"
        assert [token["id"] for token in choice["logprobs"]["content"]] == tokens[:needed]
        assert reply["usage"]["completion_tokens"] == needed
        assert read_stream(client, stop=stops, **more) == (whole[:end], "stop", needed)


def test_without_a_stop_text_in_it_an_answer_is_as_long_as_it_may_be(client: Client) -> None:
    whole = client.chat(NAME).text
    assert read_stream(client, stop=["no such text", whole[-3:] + "~"]) == (whole, "length", 12)


@given(TEXTS, STOPS)
def test_text_in_pieces_ends_where_the_whole_text_does(text: str, stops: list[str]) -> None:
    shown, held_back, is_ended = "", "", False
    for character in text:
        is_ended, count = find_stop(held_back + character, stops)
        shown += (held_back + character)[:count]
        held_back = (held_back + character)[count:]
        if is_ended:
            break
    starts = [start for stop in stops if (start := text.find(stop)) >= 0]
    end = min(starts, default=len(text))
    assert text[:end].startswith(shown)
    if is_ended:
        assert shown == text[:end]
    else:  # a longer stop text that begins earlier was still possible
        assert len(text) - len(shown) < 2 * max(map(len, stops))


def test_text_that_could_begin_a_stop_text_is_shown_when_the_answer_ends() -> None:
    tokenizer: Any = load_tokenizer(MODEL)
    answer = AnswerText(tokenizer, ["Riga!"])
    tokens = tokenizer.encode("It is Riga", add_special_tokens=False)
    shown = "".join(answer.add(token) for token in tokens)
    assert shown == "It is "
    assert answer.add(tokenizer.eos_token_id) == "Riga"
    assert answer.is_ended
