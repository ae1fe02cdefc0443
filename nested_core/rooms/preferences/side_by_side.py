"""Batches of preferences as the model reads them: each answer behind its prompt, in a row.

answer_rows.py puts both answers of a pair into one example of tokens. Here they are rows of their
own, padded to one width, of which few are used, for each is traced by `mx.compile`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nested_core.data.tokens.tokenized_split import Bool, Int32
from nested_core.training.loss.loss_interface import MicroBatch

MIN_WIDTH_STEP = 8  # positions; widths are multiples of it, and eight of them make an octave


class Conversation(NamedTuple):
    """A prompt with one answer: tokens int32 [n], and how many of them are the prompt's."""

    tokens: Int32
    prompt: int


class Pair(NamedTuple):
    """The two answers to a prompt, each behind it."""

    chosen: Conversation
    rejected: Conversation


def read_pairs(batch: MicroBatch) -> list[Pair | None]:
    """Return the pair in each row of a batch; None for a row without an example."""
    return [read_pair(tokens, target_mask) for tokens, target_mask in zip(*batch, strict=True)]


def read_pair(tokens: Int32, target_mask: Bool) -> Pair | None:
    """Return the two conversations of a pair; None for a row without an example.

    Args:
        tokens: int32 [width + 1], padded.
        target_mask: bool [width], of tokens 1, 2, ...: true for the tokens of the two answers.

    Raises ValueError for a row that holds no pair.
    """
    edges = np.flatnonzero(np.diff(target_mask, prepend=False, append=False)) + 1
    runs = edges.reshape(-1, 2).tolist()  # of targets: the tokens [begin, end)
    if not runs:
        return None
    if len(runs) != 2:
        raise ValueError(f"a pair has two answers, and this row has {len(runs)}")
    (chosen_start, chosen_end), (rejected_start, end) = runs
    chosen = Conversation(tokens[:chosen_end], chosen_start)
    return Pair(chosen, Conversation(tokens[chosen_end:end], rejected_start - chosen_end))


def lay_out_pairs(pairs: Sequence[Pair | None]) -> tuple[list[Conversation | None], MicroBatch]:
    """Return all chosen conversations, then all rejected ones, and their rows; None stays None."""
    chosen = [None if pair is None else pair.chosen for pair in pairs]
    rejected = [None if pair is None else pair.rejected for pair in pairs]
    conversations = [*chosen, *rejected]
    return conversations, lay_out(conversations)


def lay_out(conversations: Sequence[Conversation | None]) -> MicroBatch:
    """Return a batch of conversations, padded to one width, with their answers as targets.

    None becomes a row without targets.

    Returns tokens int32 [rows, width + 1] and target_mask bool [rows, width].
    """
    longest = max((len(one.tokens) for one in conversations if one is not None), default=2)
    width = round_up_width(longest - 1)
    tokens = np.zeros((len(conversations), width + 1), np.int32)
    target_mask = np.zeros((len(conversations), width), np.bool_)
    for row, one in enumerate(conversations):
        if one is not None:
            tokens[row, : len(one.tokens)] = one.tokens
            target_mask[row, one.prompt - 1 : len(one.tokens) - 1] = True
    return tokens, target_mask


def round_up_width(width: int) -> int:
    """Round up to a multiple of 8, above 128 of 16, above 256 of 32: eight widths an octave."""
    step = max(MIN_WIDTH_STEP, 1 << max((width - 1).bit_length() - 4, 0))
    return -(-width // step) * step
