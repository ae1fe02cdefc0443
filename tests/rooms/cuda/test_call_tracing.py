"""What is found by tracing a call: layers with one input, gated MLPs, and what is neither."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import llama
from mlx_lm.models.activations import swiglu
from mlx_lm.tuner.lora import LoRALinear

from nested_core.kernels.optimized_model import checkpointing_layers
from nested_core.rooms.cuda.call_tracing import (
    find_gated_mlps,
    group_layers_by_input,
    plain_swiglu,
    trace_calls,
)
from tests.architectures import ARCHITECTURES, build

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj"]
WHOLE = [*MLP, "mlp.down_proj"]
WITH_GATED = {"llama", "qwen2", "qwen3", "granite", "cohere"}


def names_of(model: nn.Module, groups: Sequence[Sequence[nn.Module]]) -> list[list[str]]:
    known = {id(module): name for name, module in model.named_modules()}
    return sorted([known[id(layer)].partition("layers.")[2] for layer in g] for g in groups)


def in_each_layer(*groups: list[str]) -> list[list[str]]:
    return sorted([f"{layer}.{key}" for key in group] for layer in (0, 1) for group in groups)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [ATTENTION, MLP]),
        ("phi3", []),
        ("cohere", [ATTENTION + MLP]),
        ("olmoe", [ATTENTION]),
    ],
)
def test_layers_with_one_input_are_found_by_tracing_not_by_name(name, expected) -> None:
    model = build(name)
    assert names_of(model, group_layers_by_input(trace_calls(model))) == in_each_layer(*expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("llama", [ATTENTION]), ("cohere", [ATTENTION]), ("granite", [ATTENTION])],
)
def test_layers_that_are_to_stay_apart_are_in_no_group(name, expected) -> None:
    model = build(name)
    apart = chain(*(mlp.layers for mlp in find_gated_mlps(trace_calls(model))))
    assert names_of(model, group_layers_by_input(trace_calls(model), apart)) == in_each_layer(
        *expected
    )


def test_a_group_of_which_one_layer_is_left_is_none() -> None:
    model = build("llama")
    apart = [layer.mlp.up_proj for layer in model.layers]
    assert names_of(model, group_layers_by_input(trace_calls(model), apart)) == in_each_layer(
        ATTENTION
    )


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gated_mlps_of_an_architecture_are_those_that_are_nothing_else(name, quantized) -> None:
    model = build(name, quantized=quantized)
    found = find_gated_mlps(trace_calls(model))
    expected = in_each_layer(WHOLE) if name in WITH_GATED else []
    assert names_of(model, [mlp.layers for mlp in found]) == expected
    if expected:
        assert [mlp.module for mlp in found] == [layer.mlp for layer in model.layers]


def test_gated_mlps_are_found_where_layers_are_under_gradient_checkpointing() -> None:
    model = build("llama")
    with checkpointing_layers(model.layers):
        found = find_gated_mlps(trace_calls(model))
        groups = group_layers_by_input(trace_calls(model))
    assert names_of(model, [mlp.layers for mlp in found]) == in_each_layer(WHOLE)
    assert names_of(model, groups) == in_each_layer(ATTENTION, MLP)


def test_layers_of_which_some_have_no_adapter_are_no_gated_mlp() -> None:
    for missing in ("gate_proj", "up_proj", "down_proj"):
        keys = [f"mlp.{key}" for key in ("gate_proj", "up_proj", "down_proj") if key != missing]
        assert find_gated_mlps(trace_calls(build("llama", keys=keys))) == []


class CalledTwice(nn.Module):
    """One layer called twice, beside two that have its input once."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once, self.too = (LoRALinear(8, 8, r=2) for _ in range(3))

    def __call__(self, tokens: mx.array) -> mx.array:
        x = mx.ones((*tokens.shape, 8))
        output: mx.array = self.twice(x) + self.once(x) + self.too(x) + self.twice(2 * x)
        return output


def test_a_layer_called_twice_is_in_no_group() -> None:
    model = CalledTwice()
    (group,) = group_layers_by_input(trace_calls(model))
    assert list(map(id, group)) == [id(model.once), id(model.too)]


def state_of(model: nn.Module) -> list[Any]:
    """Classes and modes of all modules, the random state, and what swiglu is."""
    modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules()]
    random: Any = mx.random.state[0]  # type: ignore[index]
    return [*modules, random.tolist(), llama.swiglu, swiglu]


@pytest.fixture(params=[False, True])
def mixed(request: pytest.FixtureRequest) -> nn.Module:
    """A model in training or evaluation, one of its layers in the other mode."""
    model = build("llama", dropout=0.3)
    model.train(request.param)
    model.layers[1].train(not request.param)
    return model


def test_tracing_leaves_classes_modes_and_the_random_state_as_they_were(mixed: nn.Module) -> None:
    before = state_of(mixed)
    calls = trace_calls(mixed)
    assert len(find_gated_mlps(calls)) == 2
    assert len(group_layers_by_input(calls)) == 4
    assert state_of(mixed) == before
    assert llama.swiglu is plain_swiglu


def test_an_error_in_the_traced_call_leaves_everything_as_it_was(mixed: nn.Module) -> None:
    model: Any = mixed

    class Failing(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            raise RuntimeError("on purpose")

    model.layers[1].mlp = Failing()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        trace_calls(model)
    assert state_of(model) == before
