"""Attention in blocks and the exponential against MLX's own, and a whole optimized model."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama

from nested_core.kernels import blocked_attention
from nested_core.kernels.exponential import exponential
from nested_core.kernels.optimized_model import using_optimized_layers
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import (
    batch,
    build,
    kinds_of,
    largest_difference,
    outcome,
    require_near,
    uncompiled,
)
from tests.left_out import slow_except


@pytest.mark.parametrize("length", [63, 64, 65, 130])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_causal_attention_in_blocks_gives_mlxs_output_and_gradients(length, kv_heads) -> None:
    mx.random.seed(0)
    queries, g = (mx.random.normal((2, 4, length, 8)) for _ in range(2))
    keys, values = (mx.random.normal((2, kv_heads, length, 8)) for _ in range(2))

    def attend(function: Any) -> Any:
        return mx.vjp(
            lambda *qkv: function(*qkv, None, 0.3, "causal"), [queries, keys, values], [g]
        )

    found, expected = (
        attend(blocked_attention.causal_attention),
        attend(blocked_attention.plain_attention),
    )
    for ours, theirs in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert mx.abs(ours - theirs).max().item() <= 2e-6 * mx.abs(theirs).max().item()  # type: ignore[operator]


def test_other_masks_and_lengths_go_to_mlx_lm_as_they_are() -> None:
    x = mx.random.normal((1, 2, 64, 8))
    for mask in (None, mx.ones((64, 64), mx.bool_)):
        found = blocked_attention.causal_attention(x, x, x, None, 0.3, mask)
        assert mx.array_equal(
            found, blocked_attention.plain_attention(x, x, x, None, 0.3, mask)
        ).item()
    last = blocked_attention.causal_attention(x[:, :, -1:], x, x, None, 0.3, "causal")
    assert mx.array_equal(
        last, blocked_attention.plain_attention(x[:, :, -1:], x, x, None, 0.3, "causal")
    ).item()


@pytest.mark.parametrize(
    "name",
    slow_except(
        ["llama", "qwen2", "phi3", "gemma3_text"],
        "llama",
        "gemma3_text",
        reason="compiles another model",
    ),
)
def test_an_optimized_model_gives_mlx_lms_loss_and_gradients(name: str) -> None:
    model = build(name)
    given = batch(rows=2, width=80)
    expected = outcome(model, SUPERVISED_LOSS, given)
    kinds = kinds_of(model)
    with using_optimized_layers(model):
        found = outcome(model, SUPERVISED_LOSS, given)
        plain = outcome(model, SUPERVISED_LOSS, given, compiled=uncompiled)
    require_near(found, expected, loss=2e-6, gradients=3e-5)
    assert plain.loss == found.loss
    assert largest_difference(found.gradients, plain.gradients) == 0
    assert kinds_of(model) == kinds
    assert llama.scaled_dot_product_attention is blocked_attention.plain_attention


def test_the_exponential_is_right_within_the_rounding_of_its_argument() -> None:
    x = mx.concatenate([mx.linspace(-80, 80, 10_001), mx.array([-math.inf, 0.0, math.inf])])
    exact, found = np.exp(np.array(x).astype(np.float64)), np.array(exponential(x))
    assert found[-3:].tolist() == [0.0, 1.0, math.inf]
    units = np.abs(found[:-3] / exact[:-3] - 1) / np.finfo(np.float32).eps
    assert (units <= np.abs(np.array(x[:-3])) + 1).all()
