"""Keys that name no module, and a model without the layers that add nothing.

That training takes keys is in test_training_lora.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama, olmoe
from mlx_lm.tuner.lora import LoRALinear

from nested_core.errors import ConfigError
from nested_core.models.lora_attachment import attach_adapter, leaving_out_idle_layers
from tests.architectures import ARCHITECTURES, SIZES
from tests.example import example_config


def test_a_module_of_the_experts_is_suggested_for_its_last_name() -> None:
    sizes: dict[str, Any] = {"model_type": "olmoe"} | SIZES | ARCHITECTURES["olmoe"]
    model = olmoe.Model(olmoe.ModelArgs.from_dict(sizes))
    config = example_config(num_layers=2, lora_parameters={"keys": ["gate_proj"]})
    with pytest.raises(ConfigError) as refused:
        attach_adapter(model, config)
    message = str(refused.value)
    assert "No module is named gate_proj; did you mean mlp.switch_mlp.gate_proj?" in message


def make_llama(**changes: Any) -> Any:
    mx.random.seed(3)
    model = llama.Model(llama.ModelArgs.from_dict({"model_type": "llama"} | SIZES | changes))
    mx.eval(model.parameters())
    attach_adapter(model, example_config(num_layers=-1))
    return model


def lora_layers(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def test_a_fresh_adapter_is_left_out_without_a_change_of_one_bit() -> None:
    model, tokens = make_llama(), mx.array([[5, 9, 2, 7]])
    before, layers = model(tokens), lora_layers(model)
    assert layers
    with leaving_out_idle_layers(model):
        assert not lora_layers(model)
        assert mx.array_equal(model(tokens), before)
    assert lora_layers(model) == layers


def test_a_layer_that_adds_something_stays_and_all_are_back_after_an_error() -> None:
    model, tokens = make_llama(), mx.array([[5, 9, 2, 7]])
    layers = lora_layers(model)
    used = next(iter(layers))
    layers[used].lora_b = layers[used].lora_b + 0.5
    expected = model(tokens)
    with pytest.raises(KeyError), leaving_out_idle_layers(model):  # noqa: PT012
        assert lora_layers(model) == {used: layers[used]}
        assert mx.array_equal(model(tokens), expected)
        raise KeyError
    assert lora_layers(model) == layers


def test_nothing_is_left_out_of_a_model_without_an_adapter() -> None:
    model = llama.Model(llama.ModelArgs.from_dict({"model_type": "llama"} | SIZES))
    with leaving_out_idle_layers(model):
        assert model(mx.array([[1, 2]])).shape[-1] == SIZES["vocab_size"]
