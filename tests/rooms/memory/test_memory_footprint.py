"""The footprint of a model's layers and its dequantized weights, read from their shapes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from nested_core.kernels.quantized_linear import multiplying_by_dequantized_weights
from nested_core.rooms.memory.model_footprint import dequantized_weight_bytes, read_layer_footprints
from nested_core.rooms.memory.peak_estimate import LayerFootprint
from tests.architectures import ARCHITECTURES, build


def layers_of(model: nn.Module, **settings: Any) -> tuple[LayerFootprint, ...]:
    return read_layer_footprints(model, dict(model.named_modules()), **settings)


def test_a_llamas_layer_is_read_as_the_docstring_says() -> None:
    d, a, k, m, r = 64, 64, 32, 128, 8
    expected = LayerFootprint(
        d,
        4 * d + 2 * a + 2 * k + 3 * m + 7 * r,
        m,
        4,
        is_trained=True,
        mlp_product=m,
        attention=a,
        qkv=a + 2 * k,
    )
    assert layers_of(build("llama", rank=8)) == (expected, expected)
    assert layers_of(build("llama", rank=8, quantized=True)) == (expected, expected)


def test_the_product_of_an_mlp_is_recomputed_where_all_of_it_is_lora_without_dropout() -> None:
    model = build("llama", rank=8)
    assert [layer.mlp_product for layer in layers_of(model)] == [128, 128]
    assert [layer.mlp_product for layer in layers_of(model, uses_dropout=True)] == [0, 0]
    assert [layer.mlp_product for layer in layers_of(model, input_copies=2)] == [0, 0]
    some = build("llama", rank=8, keys=["mlp.up_proj", "mlp.down_proj"])
    others = some, build("llama", rank=4), build("phi3", rank=8), build("gemma2", rank=8)
    for other in others:
        assert [layer.mlp_product for layer in layers_of(other)] == [0, 0]


def test_only_quantised_layers_have_a_dequantized_weight() -> None:
    model = build("llama", quantized=True, vocab_size=1000)
    words, down = model.model.embed_tokens, model.layers[0].mlp.down_proj.linear
    assert (dequantized_weight_bytes(words), dequantized_weight_bytes(down)) == (
        4 * 1000 * 64,
        4 * 64 * 128,
    )
    assert (
        dequantized_weight_bytes(model.layers[0]) == dequantized_weight_bytes(nn.Linear(4, 4)) == 0
    )
    assert dequantized_weight_bytes(nn.QuantizedLinear(64, 64, mode="mxfp4")) == 0
    with multiplying_by_dequantized_weights(model):
        assert dequantized_weight_bytes(words) == 4 * 1000 * 64
    model.set_dtype(mx.bfloat16)
    assert dequantized_weight_bytes(words) == 2 * 1000 * 64


def test_inputs_of_layers_that_are_not_trained_are_not_kept() -> None:
    (all_of_it, _), (some, _) = (
        layers_of(build("llama", keys=keys))
        for keys in (None, ["self_attn.q_proj", "self_attn.v_proj"])
    )
    inputs_and_factors = 64 + 64 + 128 + 5 * 4  # of o, gate and up, down, and five more factors
    assert all_of_it.kept - some.kept == inputs_and_factors


def test_dropout_gives_each_trained_layer_an_input_of_its_own() -> None:
    model = build("llama")
    once = 64 + 64 + 64 + 128  # of q, k and v; o; gate and up; down
    each = 3 * 64 + 64 + 2 * 64 + 128
    assert layers_of(model, uses_dropout=True)[0].kept == layers_of(model)[0].kept - once + 2 * each


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_read(name: str) -> None:
    for layer in layers_of(build(name)):
        assert (layer.width, layer.heads, layer.is_trained) == (64, 4, True)
        assert 600 < layer.kept < 2000
        assert layer.mlp_width in (128, 2 * 128)  # of two chosen experts: olmoe
