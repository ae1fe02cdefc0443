"""Examples -> exactly the tokens that mlx-lm trains on, in flat arrays.

Truncates as mlx-lm does, keeps count of it, and supervises no pad token. Judges nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nested_core.data.decoding import shorten
from nested_core.data.fields import Example

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenizedSplit:
    """All examples of a split, one after the other.

    tokens: int32 [sum of lengths]; starts: int64 [n + 1], where each example begins and the last
    ends; supervised_from: int32 [n], the first position of each example that is learnt. Position t
    of an example is supervised when max(1, supervised_from) <= t < length: nothing predicts 0.
    """

    tokens: Int32
    starts: Int64
    supervised_from: Int32

    def __len__(self) -> int:
        return len(self.supervised_from)

    @property
    def lengths(self) -> Int64:
        """Tokens in each example, int64 [n]."""
        return np.diff(self.starts)

    @property
    def supervised_counts(self) -> Int64:
        """Supervised tokens in each example, int64 [n]."""
        return np.maximum(self.lengths - np.maximum(self.supervised_from, 1), 0)

    def example(self, index: int) -> Int32:
        """The tokens of one example, int32 [length], as a view."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]


@dataclass(frozen=True)
class EncodedExample:
    """One example before truncation; `offset` is where mlx-lm's prompt mask ends."""

    tokens: list[int]
    offset: int = 0
    continues_prompt: bool = True


@dataclass
class TokenFacts:
    """What the token rules need to know of each example, column by column."""

    line: array[int] = field(default_factory=lambda: array("i"))
    full_length: array[int] = field(default_factory=lambda: array("i"))
    length: array[int] = field(default_factory=lambda: array("i"))
    supervised: array[int] = field(default_factory=lambda: array("i"))
    continues_prompt: array[int] = field(default_factory=lambda: array("b"))
    has_end: array[int] = field(default_factory=lambda: array("b"))
    problems: list[tuple[int, str]] = field(default_factory=list)  # line and what was raised


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can turn messages into tokens (mlx_lm's wrapper, or a plain one)."""
    if hasattr(tokenizer, "has_chat_template"):
        return bool(tokenizer.has_chat_template)
    return getattr(tokenizer, "chat_template", None) is not None


def encode_example(example: Example, tokenizer: Any, *, mask_prompt: bool) -> EncodedExample:
    """Tokens and mask offset as in mlx_lm/tuner/datasets.py; raises what the template raises."""
    if example.format == "text":
        return EncodedExample(_encode_text(example.text, tokenizer))
    template, tools = tokenizer.apply_chat_template, example.tools
    tokens = list(template(example.messages, tools=tools, return_dict=False))
    if not mask_prompt:
        return EncodedExample(tokens)
    prompt = template(
        example.messages[:-1],
        tools=tools,
        add_generation_prompt=example.messages[-1]["role"] == "assistant",
        return_dict=False,
    )
    return EncodedExample(tokens, len(prompt), tokens[: len(prompt)] == list(prompt))


def _encode_text(text: str, tokenizer: Any) -> list[int]:
    tokens = list(tokenizer.encode(text))
    end = tokenizer.eos_token_id
    if end is not None and (not tokens or tokens[-1] != end):
        tokens.append(end)
    return tokens


def tokenize(
    examples: Iterable[tuple[int, Example]],
    tokenizer: Any,
    *,
    max_seq_length: int,
    mask_prompt: bool = False,
) -> tuple[TokenizedSplit, TokenFacts]:
    """Tokenise (line, example) pairs; those for which the chat template raises are left out.

    Every example is cut to `max_seq_length` tokens, as mlx-lm does when it makes a batch.
    """
    tokens, starts, offsets, facts = array("i"), array("q", [0]), array("i"), TokenFacts()
    ends = _end_tokens(tokenizer)
    for line, example in examples:
        try:
            encoded = encode_example(example, tokenizer, mask_prompt=mask_prompt)
        except Exception as error:  # a template is a program of its author's: it may raise anything
            facts.problems.append((line, shorten(f"{type(error).__name__}: {error}", 160)))
            continue
        kept = encoded.tokens[:max_seq_length]
        tokens.extend(kept)
        starts.append(len(tokens))
        offsets.append(encoded.offset)
        _note(facts, line, encoded, kept[max(1, encoded.offset) :], len(kept), ends)
    arrays = (np.asarray(tokens), np.asarray(starts), np.asarray(offsets))
    return TokenizedSplit(*arrays), facts


def _end_tokens(tokenizer: Any) -> frozenset[int]:
    ends = getattr(tokenizer, "eos_token_ids", None) or {tokenizer.eos_token_id}
    return frozenset(ends) - {None}


def _note(
    facts: TokenFacts,
    line: int,
    encoded: EncodedExample,
    supervised: list[int],
    length: int,
    ends: frozenset[int],
) -> None:
    facts.line.append(line)
    facts.full_length.append(len(encoded.tokens))
    facts.length.append(length)
    facts.supervised.append(len(supervised))
    facts.continues_prompt.append(encoded.continues_prompt)
    facts.has_end.append(not ends.isdisjoint(supervised))
