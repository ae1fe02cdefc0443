"""Tokenize one example as mlx-lm does, and find the token spans that the loss counts.

Nothing is truncated or rejected; a template that rewrites earlier turns is only recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

from nested_core.data.data_settings import Targets
from nested_core.data.lines.example_parsing import Example, find_row_format
from nested_core.data.tokens.control_tokens import (
    has_control_token,
    note_control_tokens,
    note_taken_ends,
    note_tokens_in_text,
)
from nested_core.data.tokens.shown_texts import Note, list_texts, note_unshown_texts, shows_all
from nested_core.models.chat_template import chat_template_of

Span = tuple[int, int]
# Adds what the template puts before an answer.
_GENERATION_PROMPT_ARGUMENT = {"add_generation_prompt": True}


@dataclass(frozen=True)
class EncodedExample:
    """One tokenized example before truncation.

    spans: the token ranges [begin, end) that the loss counts, ascending.
    broken_turn: the index of the first message whose templated prompt is not a prefix of the whole
        templated example; -1 if all are.
    notes: what of the row is missing in the tokens, or is read as something else.
    is_whole: whether the example must not be truncated, since it would then mean something else.
    """

    tokens: list[int]
    spans: tuple[Span, ...]
    broken_turn: int = -1
    notes: tuple[Note, ...] = ()
    is_whole: bool = False


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether a tokenizer (mlx_lm's wrapper, or a plain one) has a chat template."""
    if hasattr(tokenizer, "has_chat_template"):
        return bool(tokenizer.has_chat_template)
    return getattr(tokenizer, "chat_template", None) is not None


def encode_example(example: Example, tokenizer: Any, targets: Targets) -> EncodedExample:
    """Tokenize an example as mlx_lm/tuner/datasets.py does, with the spans that the loss counts.

    targets: `last` starts where mlx-lm's prompt mask ends. `all` covers each assistant turn, from
        the end of the templated turns before it to the end of the templated turns up to it. A turn
        marked as not to be learnt is in no span; under `last` the caller must check that the last
        one is learnt.

    Turns are prepared for the template first (ChatTemplate). Raises what the template raises.
    """
    kind = find_row_format(example.format)
    if kind.encode is not None:
        encoded: EncodedExample = kind.encode(example, tokenizer)
        return encoded
    if not kind.is_templated:
        tokens = _encode_text(example.text, tokenizer)
        notes = note_tokens_in_text(example.text, tokens, tokenizer)
        return EncodedExample(tokens, ((0, len(tokens)),), notes=notes)
    templated = _TemplatedExample(example, tokenizer)
    if targets == "last":
        encoded = _supervise_last_turn(example, templated)
    elif targets == "whole":
        encoded = _supervise_whole_but_masked_turns(example, templated)
    else:
        encoded = _supervise_all_turns(example, templated)
    notes = templated.list_notes(targets, encoded.broken_turn)
    return replace(encoded, notes=notes) if notes else encoded


def _encode_text(text: str, tokenizer: Any) -> list[int]:
    """Tokenize a plain text and append the end-of-sequence token if it is missing."""
    tokens = list(tokenizer.encode(text))
    end = tokenizer.eos_token_id
    if end is not None and (not tokens or tokens[-1] != end):
        tokens.append(end)
    return tokens


def _supervise_last_turn(example: Example, templated: _TemplatedExample) -> EncodedExample:
    """Return the example with a span over its last turn."""
    tokens = templated.tokens
    last = len(example.messages) - 1
    prompt = _GENERATION_PROMPT_ARGUMENT if example.messages[last]["role"] == "assistant" else {}
    begin = templated.prefix_length(last, **prompt)
    if begin is None:
        return EncodedExample(tokens, (), last)
    return EncodedExample(tokens, ((begin, len(tokens)),))


def _supervise_all_turns(example: Example, templated: _TemplatedExample) -> EncodedExample:
    """Return the example with a span over each learnt assistant turn."""
    turns = [turn for turn, one in enumerate(example.messages) if one["role"] == "assistant"]
    learnt = [turn for turn in turns if turn not in example.masked]
    spans, broken_turn = _locate_turns(example, templated, learnt)
    return EncodedExample(templated.tokens, tuple(spans), broken_turn)


def _supervise_whole_but_masked_turns(
    example: Example, templated: _TemplatedExample
) -> EncodedExample:
    """Return the example with spans over everything except the turns not to be learnt."""
    tokens = templated.tokens
    masked, broken_turn = _locate_turns(example, templated, sorted(example.masked))
    edges = [0, *chain.from_iterable(masked), len(tokens)]
    spans = zip(edges[::2], edges[1::2], strict=True)
    return EncodedExample(tokens, tuple(span for span in spans if span[0] < span[1]), broken_turn)


def _locate_turns(
    example: Example, templated: _TemplatedExample, turns: Sequence[int]
) -> tuple[list[Span], int]:
    """Return the token span of each of these turns, and the first turn that cannot be located.

    The span of an answer begins after what the template puts before it. Locating stops at the first
    turn that cannot be located; the second value is -1 if all can.
    """
    tokens = templated.tokens
    spans: list[Span] = []
    for turn in turns:
        is_answer = example.messages[turn]["role"] == "assistant"
        prompt = _GENERATION_PROMPT_ARGUMENT if is_answer else {}
        begin = 0 if turn == 0 and not is_answer else templated.prefix_length(turn, **prompt)
        is_last = turn == len(example.messages) - 1
        end = len(tokens) if is_last else templated.prefix_length(turn + 1)
        if begin is None or end is None:
            return spans, turn
        spans.append((begin, end))
    return spans, -1


class _TemplatedExample:
    """A templated example's text and tokens, and how many tokens its first turns take.

    The first turns, templated and tokenized by themselves, must give the first tokens of the whole.
    Tokenizing each prefix anew is quadratic in the turns, so their texts are looked up among the
    positions at which tokens of the whole end. An added token, such as <|end|>, splits a text into
    parts that are tokenized independently, so only what follows the last one is compared.
    """

    def __init__(self, example: Example, tokenizer: Any) -> None:
        """Render and tokenize the example with the tokenizer's chat template."""
        self._example = example
        self._tokenizer = tokenizer
        self._template = chat_template_of(tokenizer)
        self._messages = self._template.prepare(example.messages)
        self._text = ""  # empty where the tokens are not those of a text
        self.tokens: list[int]
        self._encoded: Any = None  # what the tokenizer made of the text
        if self._template.text_tokenizer is None:
            self.tokens = self.tokenize_first_turns(len(self._messages))
            return
        self._text = self._render_first_turns(len(self._messages))
        self._encoded = self._template.text_tokenizer(self._text, add_special_tokens=False)
        self.tokens = self._encoded["input_ids"]

    def list_notes(self, targets: Targets, broken_turn: int) -> tuple[Note, ...]:
        """Return notes on what the template leaves out, and on control tokens in the text.

        If a turn is broken, missing texts are not looked for, since the row is refused for that
        turn.
        """
        example = self._example
        if example.is_plain and self._messages == example.messages:
            contents = [turn["content"] for turn in self._messages]
            if not has_control_token(contents, self._tokenizer) and shows_all(self._text, contents):
                return ()
        texts = list_texts(self._messages, example.tools)
        notes = note_taken_ends(example.messages, self._messages, self._template)
        notes += note_control_tokens(texts, self._tokenizer)
        if self._text and broken_turn < 0:
            notes += note_unshown_texts(texts, self._text, example, targets)
        return tuple(notes)

    @cached_property
    def _offsets(self) -> list[tuple[int, int]]:
        """Start and end of each token in the text, in characters.

        Empty without a fast tokenizer.
        """
        is_located = self._encoded is not None and self._encoded.is_fast
        return self._encoded.encodings[0].offsets if is_located else []

    @cached_property
    def _counts(self) -> dict[int, int]:
        """The number of tokens up to each character position at which a token ends."""
        return {end: count for count, (_, end) in enumerate(self._offsets, start=1)}

    def prefix_length(self, turns: int, **more: Any) -> int | None:
        """Return how many tokens the first turns take.

        Returns None if they are not a prefix of the whole.
        """
        if (
            self._offsets
            and (count := self._count_tokens_of_prefix(self._render_first_turns(turns, **more)))
            is not None
        ):
            return count
        prefix = self.tokenize_first_turns(turns, **more)
        return len(prefix) if self.tokens[: len(prefix)] == prefix else None

    def _count_tokens_of_prefix(self, prefix: str) -> int | None:
        """Return how many tokens a prefix of the text takes, by token offsets.

        Returns None if undecided.
        """
        count = self._counts.get(len(prefix))
        if count is None or not self._text.startswith(prefix):
            return None
        added = _added_token_ids(self._tokenizer)
        last = next((i for i in range(count - 1, -1, -1) if self.tokens[i] in added), None)
        if last is None:
            return None
        rest = prefix[self._offsets[last][0] :]
        encoding = self._tokenizer.backend_tokenizer.encode(rest, add_special_tokens=False)
        return count if encoding.ids == self.tokens[last:count] else None

    def tokenize_first_turns(self, turns: int, **more: Any) -> list[int]:
        """Tokenize the first turns by themselves."""
        return self._template.tokenize(self._messages[:turns], self._example.tools, **more)

    def _render_first_turns(self, turns: int, **more: Any) -> str:
        """Render the text of the first turns by themselves."""
        return self._template.render(self._messages[:turns], self._example.tools, **more)


@lru_cache(maxsize=2)
def _added_token_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of added tokens that split a text before it is normalized."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(token for token, description in added if not description.normalized)
