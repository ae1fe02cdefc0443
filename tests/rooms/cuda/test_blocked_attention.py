"""Attention in blocks against MLX's own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from nested_core.rooms.cuda.blocked_attention import attend_in_blocks
from nested_core.rooms.cuda.padded_attention import plain_attention


@pytest.mark.parametrize("length", [63, 64, 65, 130])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_causal_attention_in_blocks_gives_mlxs_output_and_gradients(length, kv_heads) -> None:
    mx.random.seed(0)
    queries, g = (mx.random.normal((2, 4, length, 8)) for _ in range(2))
    keys, values = (mx.random.normal((2, kv_heads, length, 8)) for _ in range(2))

    def attend(function: Any) -> Any:
        return mx.vjp(function, [queries, keys, values], [g])

    found = attend(lambda q, k, v: attend_in_blocks(q, k, v, 0.3))
    expected = attend(lambda q, k, v: plain_attention(q, k, v, None, 0.3, "causal"))
    for ours, theirs in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert mx.abs(ours - theirs).max().item() <= 2e-6 * mx.abs(theirs).max().item()  # type: ignore[operator]
