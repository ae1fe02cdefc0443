"""How far a model's predictions have moved: KL(reference || candidate) in nats a token.

One pass keeps what it needs of each prediction, a later pass with other weights is compared to it.
With a small vocabulary that is the whole distribution. With a large one it is the likeliest tokens
and the rest as one, which can only lose divergence: by how much at most is computed too.

It predicts what a fine-tuned model forgets, which the norm of its weights does not
(arXiv 2509.04259).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import numpy as np

MOST_ENTRIES = 64 * 2**20  # 256 MiB of log-probabilities in float32
MOST_TOP_TOKENS = 1024
FEWEST_TOP_TOKENS = 64
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class KeptPredictions:
    """What is kept of next-token distributions, a row a position.

    tokens: ids of the likeliest tokens (rows, kept), int32; None if all of the vocabulary is kept.
    log_probabilities: of those tokens, or of all in order, float32.
    rest: log-probability of all other tokens together (rows,), float32; -inf if there are none.
    """

    tokens: Array | None
    log_probabilities: Array
    rest: Array


@dataclass(frozen=True)
class Drift:
    """A mean KL divergence.

    positions: how many predictions it is the mean of.
    mean: in nats a position; what was kept of the predictions gives at least 0 and at most the
    true value.
    error: by how much the true value may be larger.
    """

    positions: int
    mean: float
    error: float

    @classmethod
    def join(cls, parts: Iterable[Self]) -> Self:
        """The drift over all positions of several batches; ValueError if there is none."""
        listed = list(parts)
        positions = sum(part.positions for part in listed)
        if not positions:
            raise ValueError("there is no prediction to compare")
        mean = math.fsum(part.mean * part.positions for part in listed) / positions
        error = math.fsum(part.error * part.positions for part in listed) / positions
        return cls(positions, mean, error)


def tokens_to_keep(positions: int, vocabulary: int) -> int:
    """How many tokens a prediction to keep, so that MOST_ENTRIES bounds the memory."""
    if positions * vocabulary <= MOST_ENTRIES:
        return vocabulary
    affordable = MOST_ENTRIES // (2 * positions)  # ids take as much as log-probabilities
    return min(vocabulary, max(FEWEST_TOP_TOKENS, min(MOST_TOP_TOKENS, affordable)))


def keep_predictions(logits: mx.array, count: int) -> KeptPredictions:
    """Keep `count` tokens of each distribution; logits (rows, vocabulary) of any float dtype."""
    log_probabilities = _log_softmax(logits)
    rows, vocabulary = log_probabilities.shape
    if count >= vocabulary:
        return KeptPredictions(
            None, np.array(log_probabilities), np.full(rows, -np.inf, np.float32)
        )
    order = mx.argpartition(-log_probabilities, kth=count, axis=-1)
    top = order[:, :count]
    rest = mx.take_along_axis(log_probabilities, order[:, count:], axis=-1)
    return KeptPredictions(
        np.array(top.astype(mx.int32)),
        np.array(mx.take_along_axis(log_probabilities, top, axis=-1)),
        np.array(mx.logsumexp(rest, axis=-1)),
    )


def kl_divergence(reference: KeptPredictions, logits: mx.array) -> Drift:
    """KL(reference || candidate) at the same positions; candidate logits (rows, vocabulary).

    With the other tokens as one it is sum over the kept of p log(p / q), plus the same of the rest;
    by the log sum inequality the true value is at least that. A token of the rest has a p that is
    at most the smallest kept and at most the rest, and a q that is at least the smallest of them,
    which bounds the true value from above.
    """
    candidate = _log_softmax(logits)
    kept = mx.array(reference.log_probabilities)
    if reference.tokens is None:
        return _sum_up(_expected_ratio(kept, candidate).sum(axis=-1), mx.zeros(kept.shape[0]))
    tokens = mx.array(reference.tokens)
    rest = mx.array(reference.rest)
    divergence = _expected_ratio(kept, mx.take_along_axis(candidate, tokens, axis=-1)).sum(axis=-1)
    outside = mx.put_along_axis(candidate, tokens, mx.array(-mx.inf), axis=-1)
    candidate_rest = mx.logsumexp(outside, axis=-1)
    least = mx.put_along_axis(candidate, tokens, mx.array(mx.inf), axis=-1).min(axis=-1)
    most = mx.minimum(kept.min(axis=-1), rest)
    error = mx.exp(rest) * ((most - least) - (rest - candidate_rest))
    return _sum_up(divergence + _expected_ratio(rest, candidate_rest), mx.maximum(error, 0.0))


def _log_softmax(logits: mx.array) -> mx.array:
    exact = logits.astype(mx.float32)
    return exact - mx.logsumexp(exact, axis=-1, keepdims=True)


def _expected_ratio(log_p: mx.array, log_q: mx.array) -> mx.array:
    """p log(p / q), which is 0 where p is."""
    ratio = mx.exp(log_p) * (log_p - log_q)
    return mx.where(log_p == -mx.inf, 0.0, ratio)


def _sum_up(divergence: mx.array, error: mx.array) -> Drift:
    """The mean over rows, in float64; rounding below 0 counts as none."""
    rows = np.maximum(np.array(divergence, np.float64), 0.0)
    return Drift(len(rows), float(rows.mean()), float(np.array(error, np.float64).mean()))
