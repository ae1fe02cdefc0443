"""One example -> the tokens that mlx-lm makes of it, and the spans of them that the loss counts.

Truncates nothing and judges nothing: a template that rewrites earlier turns is only noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from nested_core.data.data_settings import Targets
from nested_core.data.lines.example_parsing import FORMATS, Example

Span = tuple[int, int]
# Adds what the template puts before an answer.
_GENERATION_PROMPT_ARGUMENT = {"add_generation_prompt": True}


@dataclass(frozen=True)
class EncodedExample:
    """One example before truncation.

    spans: the ranges [begin, end) of tokens that the loss counts, ascending; broken_turn: the index
    of the first message whose prompt, as templated, does not begin the whole templated example,
    else -1.
    """

    tokens: list[int]
    spans: tuple[Span, ...]
    broken_turn: int = -1


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can turn messages into tokens (mlx_lm's wrapper, or a plain one)."""
    if hasattr(tokenizer, "has_chat_template"):
        return bool(tokenizer.has_chat_template)
    return getattr(tokenizer, "chat_template", None) is not None


def encode_example(example: Example, tokenizer: Any, targets: Targets) -> EncodedExample:
    """Tokens as in mlx_lm/tuner/datasets.py; raises what the template raises.

    `last` starts where mlx-lm's prompt mask ends. `all` runs, for each assistant turn, from the end
    of the templated turns before it to the end of the templated turns up to it. A turn that is
    marked as not to be learnt is in no span; under `last` the caller sees that the last one is not.
    """
    if not FORMATS[example.format].is_templated:
        tokens = _encode_text(example.text, tokenizer)
        return EncodedExample(tokens, ((0, len(tokens)),))
    tokens = _apply_template(tokenizer, example, len(example.messages))
    if targets == "whole" and not example.masked:
        return EncodedExample(tokens, ((0, len(tokens)),))
    if targets == "last":
        return _encode_with_last_turn_supervised(example, tokenizer, tokens)
    if targets == "whole":
        return _encode_whole_without_masked_turns(example, tokenizer, tokens)
    return _encode_with_all_turns_supervised(example, tokenizer, tokens)


def _encode_text(text: str, tokenizer: Any) -> list[int]:
    tokens = list(tokenizer.encode(text))
    end = tokenizer.eos_token_id
    if end is not None and (not tokens or tokens[-1] != end):
        tokens.append(end)
    return tokens


def _apply_template(tokenizer: Any, example: Example, turns: int, **more: Any) -> list[int]:
    """The tokens of the first turns."""
    return list(_render_template(tokenizer, example, turns, return_dict=False, **more))


def _render_template(tokenizer: Any, example: Example, turns: int, **more: Any) -> Any:
    """What the chat template gives for the first turns, or for none."""
    if turns > 0:
        messages = example.messages[:turns]
        return tokenizer.apply_chat_template(messages, tools=example.tools, **more)
    # transformers looks at the first message; of a batch, at the first conversation.
    return tokenizer.apply_chat_template([[]], tools=example.tools, **more)[0]


def _encode_with_last_turn_supervised(
    example: Example, tokenizer: Any, tokens: list[int]
) -> EncodedExample:
    last = len(example.messages) - 1
    prompt = _GENERATION_PROMPT_ARGUMENT if example.messages[last]["role"] == "assistant" else {}
    prefix = _apply_template(tokenizer, example, last, **prompt)
    broken_turn = -1 if tokens[: len(prefix)] == prefix else last
    return EncodedExample(tokens, ((len(prefix), len(tokens)),), broken_turn)


def _encode_with_all_turns_supervised(
    example: Example, tokenizer: Any, tokens: list[int]
) -> EncodedExample:
    turns = [turn for turn, one in enumerate(example.messages) if one["role"] == "assistant"]
    learnt = [turn for turn in turns if turn not in example.masked]
    spans, broken_turn = _locate_turns(example, tokenizer, tokens, learnt)
    return EncodedExample(tokens, tuple(spans), broken_turn)


def _encode_whole_without_masked_turns(
    example: Example, tokenizer: Any, tokens: list[int]
) -> EncodedExample:
    masked, broken_turn = _locate_turns(example, tokenizer, tokens, sorted(example.masked))
    edges = [0, *chain.from_iterable(masked), len(tokens)]
    spans = zip(edges[::2], edges[1::2], strict=True)
    return EncodedExample(tokens, tuple(span for span in spans if span[0] < span[1]), broken_turn)


def _locate_turns(
    example: Example, tokenizer: Any, tokens: list[int], turns: Sequence[int]
) -> tuple[list[Span], int]:
    """The tokens of each of these turns, up to the first that cannot be told, and which that is.

    The tokens of an answer begin after what the template puts before it; those of the first turn
    with the first token. The second value is -1 where all turns can be told.
    """
    templated = _TemplatedExample(example, tokenizer, tokens)
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
    """The tokens of a templated example, and how many of them its first turns make.

    The first turns, templated and tokenised by themselves, must give the first tokens of the whole.
    To tokenise each beginning anew is quadratic in the turns. So their texts are looked up among
    the places at which tokens of the whole end. An added token, such as <|end|>, splits a text into
    parts that are tokenised independently: only what follows the last one needs to be compared.
    """

    def __init__(self, example: Example, tokenizer: Any, tokens: list[int]) -> None:
        self._example = example
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._text = ""  # if empty, beginnings are tokenised
        self._starts: list[int] = []  # of each token, in characters
        self._counts: dict[int, int] = {}  # end in characters -> number of tokens up to there
        if getattr(tokenizer, "is_fast", False):
            self._locate_tokens()

    def _locate_tokens(self) -> None:
        text = self._render_first_turns(len(self._example.messages))
        encoding = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        if encoding.ids != self._tokens:
            return
        self._text = text
        self._starts = [start for start, _ in encoding.offsets]
        self._counts = {end: count for count, (_, end) in enumerate(encoding.offsets, start=1)}

    def prefix_length(self, turns: int, **more: Any) -> int | None:
        """How many tokens the first turns make; None if they do not begin the whole."""
        if (
            self._text
            and (count := self._count_tokens_of_prefix(self._render_first_turns(turns, **more)))
            is not None
        ):
            return count
        prefix = _apply_template(self._tokenizer, self._example, turns, **more)
        return len(prefix) if self._tokens[: len(prefix)] == prefix else None

    def _count_tokens_of_prefix(self, prefix: str) -> int | None:
        """As `prefix_length`, from the places of the tokens; None if these do not tell."""
        count = self._counts.get(len(prefix))
        if count is None or not self._text.startswith(prefix):
            return None
        added = _added_token_ids(self._tokenizer)
        last = next((i for i in range(count - 1, -1, -1) if self._tokens[i] in added), None)
        if last is None:
            return None
        rest = prefix[self._starts[last] :]
        encoding = self._tokenizer.backend_tokenizer.encode(rest, add_special_tokens=False)
        return count if encoding.ids == self._tokens[last:count] else None

    def _render_first_turns(self, turns: int, **more: Any) -> str:
        """The text of the first turns."""
        return str(_render_template(self._tokenizer, self._example, turns, tokenize=False, **more))


@lru_cache(maxsize=2)
def _added_token_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that are found in a text before it is normalised and split."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(token for token, description in added if not description.normalized)
