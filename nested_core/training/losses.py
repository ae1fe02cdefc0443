"""The loss of a batch: cross-entropy over supervised tokens only; a pad token never counts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def supervised_loss(model: Any, tokens: mx.array, bounds: mx.array) -> tuple[mx.array, mx.array]:
    """Sum of the cross-entropy over supervised tokens, and their number.

    Args:
        model: inputs of shape (batch, length) to logits (batch, length, vocabulary), or a tuple
            that starts with them.
        tokens: (batch, length + 1) int32; token t + 1 is predicted from tokens up to t.
        bounds: (batch, 2) int32; tokens [from, to) of a row are supervised; empty row: (0, 0).

    Returns:
        Both as scalars: float32 sum in nats, int32 count.
    """
    outputs = model(tokens[:, :-1])
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    positions = mx.arange(1, tokens.shape[1])
    supervised = (positions >= bounds[:, :1]) & (positions < bounds[:, 1:])
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), tokens[:, 1:])
    return (losses * supervised).sum(), supervised.sum()
