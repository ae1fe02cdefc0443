"""Causal attention on a CPU in blocks of queries, each with the keys up to its end and no more.

MLX computes every score there and masks half of them, at the price of an exponential each, and adds
up the gradients of each slice over all keys. Other masks, dtypes, caches and devices are left to
mlx-lm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from nested_core import backend
from nested_core.kernels.exponential import exponential
from nested_core.kernels.patching import in_code_of

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
    is_float32 = queries.dtype == keys.dtype == values.dtype == mx.float32
    if not (is_causal and is_float32) or length < LEAST_LENGTH or keys.shape[2] != length:
        result: mx.array = plain_attention(queries, keys, values, cache, scale, mask, sinks)
        return result
    shared_by = queries.shape[1] // keys.shape[1]
    scaled = (queries * scale).reshape(-1, keys.shape[1], shared_by, *queries.shape[2:])
    values = mx.contiguous(values)  # else each matmul would copy its part
    outputs: Any = _in_blocks(scaled, keys[:, :, None], values[:, :, None])
    output: mx.array = outputs[0].reshape(*queries.shape[:3], values.shape[-1])
    return output


@mx.custom_function
def _in_blocks(queries: mx.array, keys: mx.array, values: mx.array) -> Any:
    """The attention's output, and each block's probabilities, which the backward pass needs.

    Queries are scaled, (batch, key heads, heads that share each, length, width); keys and values
    have 1 in the third place.
    """
    outputs, kept = [], []
    for start, end in _ranges(queries.shape[3]):
        scores = queries[..., start:end, :] @ keys[..., :end, :].swapaxes(-1, -2)
        visible = mx.arange(start, end)[:, None] >= mx.arange(end)
        scores = mx.where(visible, scores, -math.inf)
        powers = exponential(scores - scores.max(axis=-1, keepdims=True))
        kept.append(powers / powers.sum(axis=-1, keepdims=True))
        outputs.append(kept[-1] @ values[..., :end, :])
    return [mx.concatenate(outputs, axis=3), *kept]


@_in_blocks.vjp
def _(primals: Any, cotangents: Any, found: Any) -> Any:
    """With P the probabilities, O the output, g its gradient: scores' is P (g V^T - rowsum(g O)).

    Dao et al. 2022, FlashAttention, appendix B.2.
    """
    (queries, keys, values), (output, *kept) = primals, found
    ranges, gradient = _ranges(queries.shape[3]), mx.contiguous(cotangents[0])
    dq, dk, dv = [], [], []
    for (start, end), chances in zip(ranges, kept, strict=True):
        g = gradient[..., start:end, :]
        through = g @ values[..., :end, :].swapaxes(-1, -2)
        mean = (g * output[..., start:end, :]).sum(axis=-1, keepdims=True)
        slope = chances * (through - mean)
        dq.append(slope @ keys[..., :end, :])
        dk.append(slope.swapaxes(-1, -2) @ queries[..., start:end, :])
        dv.append(chances.swapaxes(-1, -2) @ g)
    return mx.concatenate(dq, axis=3), _summed(dk, ranges), _summed(dv, ranges)


def _ranges(length: int) -> list[tuple[int, int]]:
    """The first query of each block, and the first of the next, where its keys end too."""
    return list(pairwise(length * block // BLOCKS for block in range(BLOCKS + 1)))


def _summed(parts: list[mx.array], ranges: list[tuple[int, int]]) -> mx.array:
    """The sum of arrays that begin together and end with their block, over heads that share."""
    columns = []
    for index, (start, end) in enumerate(ranges):
        first, *later = (part[..., start:end, :] for part in parts[index:])
        column = sum(later, first)
        columns.append(column.sum(axis=2, keepdims=True) if column.shape[2] > 1 else column)
    return mx.concatenate(columns, axis=3)


@contextmanager
def blocked_attention(model: nn.Module) -> Iterator[None]:
    """Use the blocks in the code of a model's modules while the block runs, on a CPU alone."""
    if backend.device() != "cpu":
        yield
        return
    with in_code_of(model, NAME, plain_attention, causal_attention):
        yield
