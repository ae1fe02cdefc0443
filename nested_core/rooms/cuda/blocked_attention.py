"""Causal attention in blocks of queries, each with only the keys up to the block's last query.

MLX computes every score and masks half of them, at the price of an exponential each, and adds up
the gradients of each slice over all keys. Used for heads that no fused kernel takes.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx

QUERY_BLOCKS = 4  # in which 5/8 of the scores are computed


def attend_in_blocks(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Compute causal attention of queries (batch, heads, length, width) in blocks.

    keys, values: (batch, key heads, length, width); each key head serves several query heads.

    Returns (batch, heads, length, value width).
    """
    heads_per_key = queries.shape[1] // keys.shape[1]
    scaled = (queries * scale).reshape(-1, keys.shape[1], heads_per_key, *queries.shape[2:])
    keys, values = map(mx.contiguous, (keys, values))  # else each matmul would copy its part
    outputs: Any = _attention_in_blocks(scaled, keys[:, :, None], values[:, :, None])
    return cast(mx.array, outputs[0].reshape(*queries.shape[:3], values.shape[-1]))


@mx.custom_function
def _attention_in_blocks(queries: mx.array, keys: mx.array, values: mx.array) -> Any:
    """Return the attention's output and each block's probabilities, for the backward pass.

    queries: scaled, (batch, key heads, query heads per key head, length, width).
    keys, values: (batch, key heads, 1, length, width).
    """
    outputs, probabilities = [], []
    for start, end in _query_block_ranges(queries.shape[3]):
        scores = queries[..., start:end, :] @ keys[..., :end, :].swapaxes(-1, -2)
        visible = mx.arange(start, end)[:, None] >= mx.arange(end)
        scores = mx.where(visible, scores, -math.inf)
        probabilities.append(mx.softmax(scores, axis=-1, precise=True))
        outputs.append(probabilities[-1] @ values[..., :end, :])
    return [mx.concatenate(outputs, axis=3), *probabilities]


@_attention_in_blocks.vjp
def _attention_in_blocks_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
    """Compute the gradients of queries, keys and values, block by block.

    With P the probabilities, O the output and g its gradient, the scores' gradient is P (g V^T -
    rowsum(g O)) (Dao et al. 2022, FlashAttention, appendix B.2). Attention is causal: the queries
    of a block, from `start` to `end`, see the keys up to `end`.

    primals: queries, keys and values, (..., length, width). cotangents: the gradient of the output
        first. outputs: the forward pass's output, then the probabilities of each block.
    """
    queries, keys, values = primals
    output, *probabilities = outputs
    ranges = _query_block_ranges(queries.shape[3])
    gradient = mx.contiguous(cotangents[0])
    dq, dk, dv = [], [], []
    for (start, end), p in zip(ranges, probabilities, strict=True):
        g = gradient[..., start:end, :]
        d_probabilities = g @ values[..., :end, :].swapaxes(-1, -2)
        products = g.astype(mx.float32) * output[..., start:end, :]
        row_sums = products.sum(axis=-1, keepdims=True)
        d_scores = (p * (d_probabilities - row_sums)).astype(p.dtype)
        dq.append(d_scores @ keys[..., :end, :])
        dk.append(d_scores.swapaxes(-1, -2) @ queries[..., start:end, :])
        dv.append(p.swapaxes(-1, -2) @ g)
    d_keys, d_values = _sum_gradients(dk, ranges), _sum_gradients(dv, ranges)
    return mx.concatenate(dq, axis=3), d_keys, d_values


def _query_block_ranges(length: int) -> list[tuple[int, int]]:
    """Return start and end of each block of queries; its keys are those from 0 to the end."""
    return list(pairwise(length * block // QUERY_BLOCKS for block in range(QUERY_BLOCKS + 1)))


def _sum_gradients(parts: list[mx.array], ranges: list[tuple[int, int]]) -> mx.array:
    """Sum the blocks' gradients of keys or values, over blocks and over the heads of a key.

    parts: the gradient of each block, for keys from 0 to the block's end.

    Returns (batch, key heads, 1, length, width).
    """
    columns = []
    for index, (start, end) in enumerate(ranges):
        first, *later = (part[..., start:end, :] for part in parts[index:])
        column = sum(later, first)
        columns.append(column.sum(axis=2, keepdims=True) if column.shape[2] > 1 else column)
    return mx.concatenate(columns, axis=3)
