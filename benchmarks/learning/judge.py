"""How an adapter answers rows that it was not trained on, whoever trained it: one computation.

A greedy answer is the expected one exactly where each of its tokens, its end included, is the
likeliest after the prompt and the tokens before it. So one pass over prompt and answer says it
without generating; tests compare it with answers that are generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import load

from benchmarks.learning.tasks import Row

ROWS_AT_ONCE = 500
WIDTH_MULTIPLE = 8


@dataclass(frozen=True)
class Judged:
    """What one adapter does on a list of rows.

    right: of each row, whether its greedy answer is the expected one.
    loss: mean loss of the answers' tokens, in nats.
    kl: KL(adapter || base) a token of the answers, in nats.
    general_loss: mean loss a token of text like the base's that nobody trained on, in nats; None
        without such text.
    """

    right: np.ndarray[Any, np.dtype[np.bool_]]
    loss: float
    kl: float
    general_loss: float | None


class Judge:
    """A base model in memory, rows as tokens, and held-out text; it judges adapters on disk."""

    def __init__(self, base: Path, rows: Sequence[Row], general: Sequence[Sequence[int]]) -> None:
        self.folder = base
        self.base, tokenizer, *_ = load(str(base))
        self.rows = [encode(tokenizer, row) for row in rows]
        self.general = [(list(tokens), 1) for tokens in general]

    def judge(self, adapter: Path) -> Judged:
        """Judge an adapter's folder, as mlx_lm loads it."""
        model, *_ = load(str(self.folder), adapter_path=str(adapter))
        right, losses, divergences = [], [], []
        for tokens, owners, positions in batches(self.rows):
            log_p = log_probabilities(model, tokens, positions)
            targets = mx.array(tokens[:, 1:].reshape(-1)[positions])
            hits = np.array(log_p.argmax(axis=-1) == targets)
            right.append(np.bincount(owners, ~hits) == 0)
            losses.append(-np.array(mx.take_along_axis(log_p, targets[:, None], -1)))
            of_base = log_probabilities(self.base, tokens, positions)
            divergences.append(np.array((mx.exp(log_p) * (log_p - of_base)).sum(axis=-1)))
        return Judged(
            right=np.concatenate(right),
            loss=float(np.concatenate(losses).mean(dtype=np.float64)),
            kl=float(np.concatenate(divergences).mean(dtype=np.float64)),
            general_loss=mean_loss(model, self.general) if self.general else None,
        )


def encode(tokenizer: Any, row: Row) -> tuple[list[int], int]:
    """Prompt and answer in tokens, and where the answer begins."""
    turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.answer}]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    return list(whole), len(prompt)


Batch = tuple[Any, Any, Any]


def batches(rows: Sequence[tuple[list[int], int]]) -> Iterator[Batch]:
    """Tokens (rows, width), and of each answer's token its row and its place among the logits.

    All have one width: MLX compiles and plans for each shape.
    """
    longest = max(len(tokens) for tokens, _ in rows)
    width = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[first : first + ROWS_AT_ONCE]
        tokens = np.zeros((len(some), width + 1), np.int32)
        answers = np.zeros((len(some), width), np.bool_)
        for number, (row, start) in enumerate(some):
            tokens[number, : len(row)] = row
            answers[number, start - 1 : len(row) - 1] = True
        owners, places = np.nonzero(answers)
        yield tokens, owners, owners * width + places


def log_probabilities(model: nn.Module, tokens: Any, positions: Any) -> mx.array:
    """Log-probabilities (positions, vocabulary) of what comes next, float32."""
    inner: Any = model
    hidden = inner.model(mx.array(tokens[:, :-1]))
    chosen = hidden.reshape(-1, hidden.shape[-1])[mx.array(positions)]
    logits = inner.model.embed_tokens.as_linear(chosen).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def mean_loss(model: nn.Module, rows: Sequence[tuple[list[int], int]]) -> float:
    """Mean loss a token in nats."""
    total, count = 0.0, 0
    for tokens, _, positions in batches(rows):
        targets = mx.array(tokens[:, 1:].reshape(-1)[positions])
        log_p = log_probabilities(model, tokens, positions)
        total -= float(mx.take_along_axis(log_p, targets[:, None], -1).sum().item())
        count += len(positions)
    return total / count
