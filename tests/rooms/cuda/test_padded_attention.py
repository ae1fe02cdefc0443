"""Attention padded to lengths that MLX has a fused backward pass for: outputs and gradients."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from nested_core.backend import to_float
from nested_core.kernels.views import knowing_views
from nested_core.rooms.cuda import padded_attention
from nested_core.rooms.cuda.padded_attention import (
    change_length_in_mlx,
    make_padded_attention,
    plain_attention,
)
from nested_core.rooms.cuda.rope import make_rotation_call, rotate_in_mlx
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import batch, build, outcome, require_near, uncompiled

pytestmark = pytest.mark.slow("compares layers and models for CUDA with mlx-lm's")

LENGTHS: list[int] = []


def noting_lengths(arrays: Any, length: int) -> Any:
    LENGTHS.append(length)
    return change_length_in_mlx(arrays, length)


attention = make_padded_attention(noting_lengths, lambda: True)


@pytest.fixture(autouse=True)
def no_lengths() -> None:
    LENGTHS.clear()


def heads(kv_heads: int, length: int, dtype: mx.Dtype, width: int = 16) -> list[mx.array]:
    mx.random.seed(0)
    counts = (4, kv_heads, kv_heads, 4)  # queries, keys, values, the output's gradient
    return [mx.random.normal((2, n, length, width)).astype(dtype) for n in counts]


def outputs_of(function: Any, given: list[mx.array]) -> list[mx.array]:
    *arrays, gradient = given
    outputs, gradients = mx.vjp(lambda *a: function(*a, None, 0.3, "causal"), arrays, [gradient])
    return [*outputs, *gradients]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [31, 137])
def test_outputs_and_gradients_are_those_without_padding(length, kv_heads, dtype) -> None:
    given = heads(kv_heads, length, dtype)
    found, plain = outputs_of(attention, given), outputs_of(plain_attention, given)
    exact = outputs_of(plain_attention, [each.astype(mx.float32) for each in given])
    assert [-(-length // 128) * 128, length, -(-length // 128) * 128, length] == LENGTHS
    for ours, theirs, reference in zip(found, plain, exact, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == dtype
        largest = to_float(mx.abs(reference).max())
        error = to_float(mx.abs(ours - reference).max()) / largest
        assert error <= max(to_float(mx.abs(theirs - reference).max()) / largest, 2**-7)


@pytest.mark.parametrize(
    ("given", "mask", "is_training"),
    [
        (heads(2, 128, mx.bfloat16), "causal", True),
        (heads(2, 31, mx.float32), "causal", True),
        (heads(2, 31, mx.bfloat16), None, True),
        (heads(2, 31, mx.bfloat16), mx.ones((31, 31), mx.bool_), True),
        (heads(2, 31, mx.bfloat16, width=12), "causal", True),
        (heads(2, 31, mx.bfloat16), "causal", False),
    ],
    ids=["multiple", "float32", "no mask", "array", "odd head", "evaluation"],
)
def test_what_is_fused_already_or_cannot_be_goes_to_mlx_lm_as_it_is(
    given: list[mx.array], mask: Any, is_training: bool
) -> None:
    queries, keys, values, _ = given
    function = make_padded_attention(noting_lengths, lambda: is_training)
    found = function(queries, keys, values, None, 0.3, mask)
    expected = plain_attention(queries, keys, values, None, 0.3, mask)
    assert mx.array_equal(found, expected).item()
    assert LENGTHS == []


def test_a_model_in_training_pads_every_layer_and_in_evaluation_none(
    kernel_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel: Any = padded_attention.change_length_on_cuda
    monkeypatch.setattr(kernel, "launch", noting_lengths)
    monkeypatch.setattr(kernel, "agrees_with_reference", lambda *variant: True)
    model = build("llama")
    model.set_dtype(mx.float16)
    model.train()
    given = batch(rows=2, width=40)
    expected = outcome(model, SUPERVISED_LOSS, given, compiled=uncompiled)
    with padded_attention.using_padded_attention(model):
        found = outcome(model, SUPERVISED_LOSS, given, compiled=uncompiled)
        assert LENGTHS.count(128) == 2 * 2 + 2  # forwards and back, and the loss alone
        model.eval()
        LENGTHS.clear()
        mx.eval(model(mx.array(given[0])))
        assert LENGTHS == []
    require_near(found, expected, loss=1e-3, gradients=0.02)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("length", [31, 128])
def test_heads_too_wide_for_fused_kernels_are_right_within_bfloat16s_rounding(
    length: int, kv_heads: int
) -> None:
    queries, *others = heads(kv_heads, length, mx.bfloat16, width=136)
    given = [queries / 4, *others]  # scores of about 1
    found = outputs_of(attention, given)
    exact = outputs_of(plain_attention, [each.astype(mx.float32) for each in given])
    assert not LENGTHS
    for ours, reference in zip(found, exact, strict=True):
        assert ours.shape == reference.shape
        assert ours.dtype == mx.bfloat16
        difference = to_float(mx.linalg.norm(ours.astype(mx.float32) - reference))
        assert difference <= 0.01 * to_float(mx.linalg.norm(reference))


def test_rotated_queries_that_a_model_changes_in_place_are_the_changed_ones() -> None:
    """A view that was known by its id would be what it was before."""
    module = nn.RoPE(16)
    turned = make_rotation_call(module, rotate_in_mlx, {})
    queries, keys, values, _ = heads(4, 31, mx.bfloat16)

    def attend(rotate: Any, function: Any) -> mx.array:
        rotated = rotate(queries)
        rotated *= 3
        rotated[:, 0] = 1
        output: mx.array = function(rotated, rotate(keys), values, None, 0.3, "causal")
        return output

    with knowing_views():
        found = attend(turned, attention)
    assert LENGTHS == [128, 31]
    expected = attend(module, plain_attention)
    assert mx.abs(found - expected).max().item() < 0.05 * mx.abs(expected).max().item()  # type: ignore[operator]
