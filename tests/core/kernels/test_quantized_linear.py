"""Quantised layers with dequantized weights: MLX's outputs and gradients, and what stays MLX's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from nested_core import backend
from nested_core.backend import to_float
from nested_core.kernels import quantized_linear
from nested_core.kernels.quantized_linear import (
    MIN_ROWS_TO_DEQUANTIZE,
    multiplying_by_dequantized_weights,
)
from nested_core.training.loss.cross_entropy import (
    SUPERVISED_LOSS,
    ChunkedCrossEntropy,
    OutputHead,
    chain_chunks,
)
from tests.architectures import batch, build, leave_by_error, outcome, require_near
from tests.arrays import normal

KINDS: list[dict[str, Any]] = [
    {"group_size": 32, "bits": 4},
    {"group_size": 64, "bits": 8},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
]


def linear(bias: bool = True, **kind: Any) -> nn.QuantizedLinear:
    mx.random.seed(0)
    layer = nn.QuantizedLinear(128, 96, bias=bias, **kind)
    if bias:
        layer.bias = normal(96, dtype=mx.float32)
    return layer


def both(function: Callable[[mx.array], mx.array], x: mx.array, width: int) -> list[mx.array]:
    outputs, gradients = mx.vjp(
        function, [x], [normal(*x.shape[:-1], width, seed=3, dtype=mx.float32)]
    )
    return [*outputs, *gradients]


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that nobody may dequantize."""

    def ask(module: Any, computed_after: mx.array) -> mx.array:
        raise AssertionError("a weight was dequantized")

    monkeypatch.setattr(quantized_linear, "dequantize_weight", ask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_gives_mlxs_output_and_gradient(kind: dict[str, Any], bias: bool) -> None:
    layer = linear(bias, **kind)
    x = normal(3, MIN_ROWS_TO_DEQUANTIZE, 128, dtype=mx.float32)
    layer.scales = layer.scales if kind.get("mode") else layer.scales.astype(mx.float32)
    expected = both(layer, x, 96)
    with multiplying_by_dequantized_weights(layer):
        found = both(layer, x, 96)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert to_float(mx.abs(ours - theirs).max()) <= 1e-5 * to_float(mx.abs(theirs).max())


def test_an_output_layer_tied_to_a_quantised_embedding_does_too() -> None:
    mx.random.seed(0)
    embedding = nn.QuantizedEmbedding(96, 128, 32, 4)
    x, tokens = normal(2, MIN_ROWS_TO_DEQUANTIZE, 128, dtype=mx.float32), mx.array([3, 5])
    expected, words = both(embedding.as_linear, x, 96), embedding(tokens)
    with multiplying_by_dequantized_weights(embedding):
        found = both(lambda x: embedding.as_linear(x), x, 96)
        assert mx.array_equal(embedding(tokens), words).item()
    for ours, theirs in zip(found, expected, strict=True):
        assert to_float(mx.abs(ours - theirs).max()) <= 1e-5 * to_float(mx.abs(theirs).max())


@pytest.mark.usefixtures("forbidden")
def test_a_weight_is_dequantized_for_many_rows_of_the_scales_dtype_and_for_no_others() -> None:
    layer = linear()
    few, other = (
        normal(MIN_ROWS_TO_DEQUANTIZE - 1, 128, dtype=mx.float32),
        normal(MIN_ROWS_TO_DEQUANTIZE, 128, dtype=mx.bfloat16),
    )
    expected = layer(few), layer(other)
    with multiplying_by_dequantized_weights(layer):
        assert mx.array_equal(layer(few), expected[0]).item()
        assert mx.array_equal(layer(other), expected[1]).item()
        with pytest.raises(AssertionError, match="was dequantized"):
            layer(normal(MIN_ROWS_TO_DEQUANTIZE, 128, dtype=mx.float32))


@pytest.mark.usefixtures("forbidden")
def test_on_metal_mlxs_own_product_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear()
    monkeypatch.setattr(backend, "device", lambda: "gpu")
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: False)
    with multiplying_by_dequantized_weights(layer):
        mx.eval(layer(normal(MIN_ROWS_TO_DEQUANTIZE, 128, dtype=mx.float32)))


@pytest.mark.parametrize("key", ["scales", "biases"])
def test_a_layer_whose_own_parameters_are_trained_keeps_their_gradients(key: str) -> None:
    layer, x = linear(False, **KINDS[0]), normal(MIN_ROWS_TO_DEQUANTIZE, 128, dtype=mx.float32)
    layer.unfreeze(keys=key)

    def total(value: mx.array) -> mx.array:
        layer[key] = value
        result: mx.array = layer(x).square().sum()
        return result

    expected = mx.grad(total)(layer[key])
    with multiplying_by_dequantized_weights(layer):
        found = mx.grad(total)(layer[key])
    assert mx.array_equal(found, expected).item()
    assert to_float(mx.abs(found).max()) > 0


def test_layers_are_given_back_after_an_error() -> None:
    layers = [linear(), nn.QuantizedEmbedding(96, 128, 32, 4), nn.Linear(4, 4)]
    model = nn.Sequential(*layers)
    before = [type(layer) for layer in layers]

    def are_others() -> None:
        now = [type(layer) is kind for layer, kind in zip(layers, before, strict=True)]
        assert now == [False, False, True]

    leave_by_error(multiplying_by_dequantized_weights(model), are_others)
    assert [type(layer) for layer in layers] == before


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_quantised_model_gives_the_loss_and_gradients_of_mlx(name: str) -> None:
    model = build(name, quantized=True)
    expected = outcome(model, SUPERVISED_LOSS, batch())
    with multiplying_by_dequantized_weights(model):
        found = outcome(model, SUPERVISED_LOSS, batch())
    require_near(found, expected, loss=2e-6, gradients=3e-5)


@pytest.mark.slow("measures the memory of wide layers")
def test_dequantized_weights_are_not_kept_for_the_backward_pass() -> None:
    mx.random.seed(0)
    model = nn.Sequential(*[nn.QuantizedLinear(1024, 1024, bias=False) for _ in range(32)])
    x = normal(MIN_ROWS_TO_DEQUANTIZE, 1024, dtype=mx.float32)
    mx.eval(model.parameters(), x)
    with multiplying_by_dequantized_weights(model):
        step = mx.compile(mx.grad(lambda x: model(x).square().sum()))
        mx.eval(step(x))
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(x))
        peak = mx.get_peak_memory() - held
    assert peak < 16 * 1024 * 1024 * 4  # half of the dequantized weights; some are in flight


def test_the_output_layers_weight_is_made_once_for_all_chunks_of_a_batch(monkeypatch) -> None:
    model = build("llama", quantized=True)
    head = OutputHead(model, model.model)
    made = []
    own = quantized_linear._dequantize_after

    def dequantize_after(module: Any, computed_after: mx.array) -> mx.array:
        made.append(module)
        return own(module, computed_after)

    monkeypatch.setattr(quantized_linear, "_dequantize_after", dequantize_after)
    hidden = normal(5 * MIN_ROWS_TO_DEQUANTIZE, model.args.hidden_size, dtype=mx.float32)
    targets = mx.arange(len(hidden))
    outcomes = []
    loss = ChunkedCrossEntropy(head, None)
    for chunks in (1, 5):
        made.clear()
        with multiplying_by_dequantized_weights(model):
            found = chain_chunks(
                [hidden],
                len(hidden) // chunks,
                lambda parts, at: loss._compute_chunk(parts[0], targets[at], targets[at] >= 0),
            )
        assert len(found) == chunks
        assert len(made) == 1
        outcomes.append([mx.concatenate(list(parts)) for parts in zip(*found, strict=True)])
    for one, several in zip(*outcomes, strict=True):
        assert mx.allclose(one, several, rtol=1e-5, atol=1e-6).item()
