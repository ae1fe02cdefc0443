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
from nested_core.data.encoding import EncodedExample, Span, Targets, encode_example
from nested_core.data.fields import Example

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class TokenizedSplit:
    """All examples of a split, one after the other.

    tokens: int32 [sum of lengths]; supervised: bool [sum of lengths], whether the token is learnt,
    never so at the first position of an example, which nothing predicts; starts: int64 [n + 1],
    where each example begins and the last ends.
    """

    tokens: Int32
    supervised: Bool
    starts: Int64

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Int64:
        """Tokens in each example, int64 [n]."""
        return np.diff(self.starts)

    def example(self, index: int) -> Int32:
        """The tokens of one example, int32 [length], as a view."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def supervision(self, index: int) -> Bool:
        """Which tokens of one example are learnt, bool [length], as a view."""
        return self.supervised[self.starts[index] : self.starts[index + 1]]


@dataclass
class TokenFacts:
    """What the token rules need to know of each example, column by column."""

    line: array[int] = field(default_factory=lambda: array("i"))
    full_length: array[int] = field(default_factory=lambda: array("i"))
    length: array[int] = field(default_factory=lambda: array("i"))
    supervised: array[int] = field(default_factory=lambda: array("i"))
    broken_turn: array[int] = field(default_factory=lambda: array("i"))
    has_end: array[int] = field(default_factory=lambda: array("b"))
    problems: list[tuple[int, str]] = field(default_factory=list)  # line and what was raised


def tokenize(
    examples: Iterable[tuple[int, Example]],
    tokenizer: Any,
    *,
    max_seq_length: int,
    targets: Targets = "whole",
) -> tuple[TokenizedSplit, TokenFacts]:
    """Tokenise (line, example) pairs; those for which the chat template raises are left out.

    Every example is cut to `max_seq_length` tokens, as mlx-lm does when it makes a batch.
    """
    tokens, flags, starts, facts = array("i"), bytearray(), array("q", [0]), TokenFacts()
    ends = _end_tokens(tokenizer)
    for line, example in examples:
        try:
            encoded = encode_example(example, tokenizer, targets)
        except Exception as error:  # a template is a program of its author's: it may raise anything
            facts.problems.append((line, shorten(f"{type(error).__name__}: {error}", 160)))
            continue
        kept = encoded.tokens[:max_seq_length]
        spans = _cut(encoded.spans, len(kept))
        tokens.extend(kept)
        flags += _flags(spans, len(kept))
        starts.append(len(tokens))
        _note(facts, line, encoded, kept, spans, ends)
    supervised = np.frombuffer(flags, np.bool_)
    return TokenizedSplit(np.asarray(tokens), supervised, np.asarray(starts)), facts


def _cut(spans: Iterable[Span], length: int) -> list[Span]:
    """The spans within the tokens that are kept, and without the first, which nothing predicts."""
    cut = [(max(begin, 1), min(end, length)) for begin, end in spans]
    return [(begin, end) for begin, end in cut if begin < end]


def _flags(spans: list[Span], length: int) -> bytearray:
    """One byte a token: 1 where it is learnt."""
    flags = bytearray(length)
    for begin, end in spans:
        flags[begin:end] = b"\1" * (end - begin)
    return flags


def _end_tokens(tokenizer: Any) -> frozenset[int]:
    ends = getattr(tokenizer, "eos_token_ids", None) or {tokenizer.eos_token_id}
    return frozenset(ends) - {None}


def _note(
    facts: TokenFacts,
    line: int,
    encoded: EncodedExample,
    kept: list[int],
    spans: list[Span],
    ends: frozenset[int],
) -> None:
    facts.line.append(line)
    facts.full_length.append(len(encoded.tokens))
    facts.length.append(len(kept))
    facts.supervised.append(sum(end - begin for begin, end in spans))
    facts.broken_turn.append(encoded.broken_turn)
    facts.has_end.append(any(not ends.isdisjoint(kept[a:b]) for a, b in spans))
