"""The cross-entropy of the supervised tokens: the loss that a run trains with by default."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core.training.loss.chunked_cross_entropy import make_chunked_cross_entropy
from nested_core.training.loss.loss_interface import (
    Arrays,
    Loss,
    as_arrays,
    extract_logits,
    widen_for_device,
)


def supervised_loss(model: Any, tokens: mx.array, target_mask: mx.array) -> Arrays:
    """Return the sum of the cross-entropy over supervised tokens, and their number.

    Padding never counts.

    Args:
        model: maps inputs (batch, length) to logits (batch, length, vocabulary), or to a tuple that
            starts with them.
        tokens: (batch, length + 1) int32; token t + 1 is predicted from tokens up to t.
        target_mask: (batch, length) bool, whether the target (tokens 1, 2, ... of each row) counts.

    Returns:
        Two scalars: float32 sum in nats, int32 count.
    """
    total, count, _ = supervised_loss_by_row(model, tokens, target_mask)
    return total, count


def supervised_loss_by_row(
    model: Any, tokens: mx.array, target_mask: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return sum and count as `supervised_loss`, and the sum of each row, float32 (batch,)."""
    logits = extract_logits(model(tokens[:, :-1]))
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), tokens[:, 1:])
    counted = losses * target_mask
    return counted.sum(), target_mask.sum(), counted.sum(axis=1)


SUPERVISED_LOSS = Loss(
    supervised_loss,
    by_row=supervised_loss_by_row,
    prepare_batch=lambda batch: as_arrays(widen_for_device(batch)),
    with_output_head=make_chunked_cross_entropy,
)
