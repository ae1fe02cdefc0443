"""Causal attention on a CPU in blocks of queries, each with the keys up to its end and no more.

MLX computes every score there and masks half of them, at the price of an exponential each. Other
masks, caches and devices are left to mlx-lm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from nested_core import backend
from nested_core.kernels.replacing import in_code_of

NAME = "scaled_dot_product_attention"
BLOCKS = 4  # 5/8 of the scores; more blocks save less than they cost
LEAST_LENGTH = 64

plain_attention: Any = base.scaled_dot_product_attention


def causal_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's scaled_dot_product_attention, within rounding; arguments as there."""
    length = queries.shape[2]
    is_causal = isinstance(mask, str) and mask == "causal" and cache is None and sinks is None
    if not is_causal or length < LEAST_LENGTH or keys.shape[2] != length:
        result: mx.array = plain_attention(queries, keys, values, cache, scale, mask, sinks)
        return result
    ends = [length * (block + 1) // BLOCKS for block in range(BLOCKS)]
    blocks = [
        mx.fast.scaled_dot_product_attention(
            queries[:, :, start:end],
            keys[:, :, :end],
            values[:, :, :end],
            scale=scale,
            mask="causal",  # aligned at the end of the keys
        )
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return mx.concatenate(blocks, axis=2)


@contextmanager
def blocked_attention(model: nn.Module) -> Iterator[None]:
    """Use the blocks in the code of a model's modules while the block runs, on a CPU alone."""
    if backend.device() != "cpu":
        yield
        return
    with in_code_of(model, NAME, plain_attention, causal_attention):
        yield
