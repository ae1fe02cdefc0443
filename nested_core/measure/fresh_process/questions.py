"""What a fresh process is asked of a model that it has read, whatever read it.

A file of its own, for a program that reads models otherwise than by mlx_lm answers the same. It
imports nothing of this project.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

Logits = np.ndarray[Any, np.dtype[np.float32]]
ROWS_AT_ONCE = 64  # whose logits are float64 at a time


def answer_questions(reader: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """What a model computes of what is asked.

    texts: of which the token ids are wanted, with what the tokenizer is.
    prompts, columns: after which logits are wanted, and of which tokens; of some 256 if empty.
    rows: tokens, and the places of those whose log-likelihoods are summed, in nats.
    questions: prompts that are answered with the likeliest tokens, the end of the text included.
    """
    return {
        "reader": reader.name,
        "factors": reader.factors(),
        "ends": reader.ends,
        "chat_template": reader.chat_template,
        "tokenizer": reader.tokenizer_digest() if asked["texts"] else None,
        "token_ids": [reader.encode(text) for text in asked["texts"]],
        "logits": [last_logits(reader, tokens, asked["columns"]) for tokens in asked["prompts"]],
        "likelihoods": [log_likelihood(reader, **row) for row in asked["rows"]],
        "answers": [reader.answer(**question) for question in asked["questions"]],
    }


def last_logits(reader: Any, tokens: list[int], columns: list[int]) -> list[float]:
    """The logits after the last of some tokens."""
    (rows,) = reader.logits(tokens, [len(tokens) - 1])
    last = rows[0]
    chosen: list[float] = last[columns or range(0, last.size, max(1, last.size // 256))].tolist()
    return chosen


def log_likelihood(reader: Any, tokens: list[int], places: list[int]) -> float:
    """The summed log-probability of the tokens at these places, each after those before it."""
    following = np.array(tokens)[np.array(places, np.int64)]
    pieces = reader.logits(tokens[:-1], [place - 1 for place in places])
    sums: list[Any] = []
    done = 0
    for rows in split_rows(pieces):
        exact = rows.astype(np.float64)
        largest = exact.max(axis=-1)
        total = largest + np.log(np.exp(exact - largest[:, None]).sum(axis=-1))
        chosen = exact[np.arange(len(exact)), following[done : done + len(exact)]]
        sums.append(chosen - total)
        done += len(exact)
    return float(np.concatenate(sums).sum()) if sums else 0.0


def split_rows(pieces: Iterator[Logits]) -> Iterator[Logits]:
    """The rows of all pieces in order, a few at a time."""
    for piece in pieces:
        for start in range(0, len(piece), ROWS_AT_ONCE):
            yield piece[start : start + ROWS_AT_ONCE]
