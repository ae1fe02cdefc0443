"""LoRA layers with their own backward pass: mlx-lm's outputs and gradients, on its own modules."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from nested_core.backend import to_float
from nested_core.kernels.optimized_model import checkpointing_layers
from nested_core.optim.named_updates import flatten
from nested_core.rooms.cuda.call_tracing import find_gated_mlps, group_layers_by_input, trace_calls
from nested_core.rooms.cuda.lora_linear import (
    GROUP_ATTRIBUTE,
    OptimizedDoRALinear,
    OptimizedLoRALinear,
    using_optimized_lora_layers,
)
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import (
    ARCHITECTURES,
    batch,
    build,
    compiled_as_written,
    kinds_of,
    largest_difference,
    leave_by_error,
    outcome,
    require_near,
    uncompiled,
)
from tests.arrays import normal
from tests.left_out import slow_except

pytestmark = pytest.mark.slow("compares layers and models for CUDA with mlx-lm's")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "name",
    slow_except(
        [*ARCHITECTURES, "qwen2, quantised"],
        "llama",
        "qwen2",
        "qwen2, quantised",
        "gemma2",
        reason="compiles another model",
    ),
)
def test_loss_and_gradients_are_those_of_mlx_lm(name: str, grouped: bool) -> None:
    architecture, _, quantised = name.partition(", ")
    model = build(architecture, quantized=bool(quantised))
    expected = outcome(model, SUPERVISED_LOSS, batch())
    with using_optimized_lora_layers(
        model, group_layers_by_input(trace_calls(model)) if grouped else ()
    ):
        found = outcome(model, SUPERVISED_LOSS, batch())
    require_near(found, expected, loss=2e-6, gradients=3e-5)


def test_dropout_draws_what_mlx_lm_draws() -> None:
    model = build("llama", dropout=0.4)
    model.train()
    mx.random.seed(7)
    expected = outcome(model, SUPERVISED_LOSS, batch(), compiled=uncompiled)
    with using_optimized_lora_layers(model, group_layers_by_input(trace_calls(model))):
        mx.random.seed(7)
        found = outcome(model, SUPERVISED_LOSS, batch(), compiled=uncompiled)
    require_near(found, expected, loss=2e-6, gradients=3e-5)
    assert found.value != found.loss  # a second pass draws anew


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_layers_give_mlx_lms_output_and_gradients(bias, quantised, dropout) -> None:
    base = nn.Linear(64, 96, bias=bias)
    if bias:
        base.bias = normal(96, dtype=mx.float32)
    if quantised:
        base = nn.QuantizedLinear.from_linear(base, 32, 4)
    layer = DoRALinear.from_base(base, r=4, scale=3.0, dropout=dropout)
    layer.lora_b = 0.3 * normal(4, 96, dtype=mx.float32)
    layer.m = 1.3 * layer.m
    names = ("lora_a", "lora_b", "m")
    x = normal(2, 5, 64, dtype=mx.float32)
    cotangent = normal(2, 5, 96, seed=1, dtype=mx.float32)

    def output(x: mx.array, *values: mx.array) -> mx.array:
        layer.update(dict(zip(names, values, strict=True)))
        result: mx.array = layer(x)
        return result

    def both() -> list[mx.array]:
        mx.random.seed(7)
        outputs, gradients = mx.vjp(output, [x, *(layer[name] for name in names)], [cotangent])
        return [*outputs, *gradients]

    expected = both()
    with using_optimized_lora_layers(nn.Sequential(layer)):
        assert type(layer) is OptimizedDoRALinear
        found = both()
    assert type(layer) is DoRALinear
    for ours, theirs in zip(found, expected, strict=True):
        difference = mx.linalg.norm(ours - theirs) / mx.linalg.norm(theirs)
        assert to_float(difference) < 1e-6


def test_dora_layers_of_one_input_share_their_products_and_no_mlp_takes_them() -> None:
    model = build("llama", dora=True)
    trace = trace_calls(model)
    groups = [len(group) for group in group_layers_by_input(trace)]
    assert groups == [3, 2] * len(model.layers)  # q, k, v; gate and up
    assert find_gated_mlps(trace) == []
    expected = outcome(model, SUPERVISED_LOSS, batch())
    with using_optimized_lora_layers(model, group_layers_by_input(trace)):
        found = outcome(model, SUPERVISED_LOSS, batch())
    require_near(found, expected, loss=2e-6, gradients=3e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = build("llama")
    expected = outcome(model, SUPERVISED_LOSS, batch())
    with (
        checkpointing_layers(model.layers),
        using_optimized_lora_layers(model, group_layers_by_input(trace_calls(model))),
    ):
        found = outcome(model, SUPERVISED_LOSS, batch())
    assert largest_difference(found.gradients, expected.gradients) < 3e-5


@compiled_as_written
def test_compiled_equals_uncompiled_to_the_bit() -> None:
    model = build("llama")
    with using_optimized_lora_layers(model, group_layers_by_input(trace_calls(model))):
        plain = outcome(model, SUPERVISED_LOSS, batch(), compiled=uncompiled)
        compiled = outcome(model, SUPERVISED_LOSS, batch())
    assert compiled.loss == plain.loss
    for name, gradient in plain.gradients.items():
        assert np.array(gradient).tobytes() == np.array(compiled.gradients[name]).tobytes()


class CalledTwice(nn.Module):
    """One layer called twice, beside one that has its input once."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = LoRALinear(8, 8, r=2)
        self.once = LoRALinear(8, 8, r=2)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = mx.ones((*tokens.shape, 8))
        output: mx.array = self.twice(x) + self.once(x) + self.twice(2 * x)
        return output


def test_a_layer_called_twice_is_in_no_group_and_computes_each_time() -> None:
    model = CalledTwice()
    tokens = mx.zeros((1, 3), mx.int32)
    assert group_layers_by_input(trace_calls(model)) == []
    expected = model(tokens)
    with using_optimized_lora_layers(model, group_layers_by_input(trace_calls(model))):
        assert mx.allclose(model(tokens), expected).item()


class Sharing(nn.Module):
    """Layers that are given one input, each with a scale and a rank of its own."""

    def __init__(self, *kinds: tuple[float, int]) -> None:
        super().__init__()
        mx.random.seed(0)
        self.layers = [LoRALinear(16, 24, r=rank, scale=scale) for scale, rank in kinds]
        for layer in self.layers:
            layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
            layer.linear.freeze()

    def __call__(self, tokens: mx.array) -> mx.array:
        x = mx.random.normal((*tokens.shape, 16), key=mx.random.key(1))
        output: mx.array = mx.stack([layer(x) for layer in self.layers]).square().sum()
        return output


@pytest.mark.parametrize(
    ("kinds", "together"),
    [
        ([(2.0, 4), (3.0, 4)], []),
        ([(2.0, 4), (2.0, 8)], []),
        ([(2.0, 4), (3.0, 4), (2.0, 4)], [[0, 2]]),
        ([(2.0, 4), (2.0, 4), (3.0, 8), (3.0, 8)], [[0, 1], [2, 3]]),
        ([(2.0, 4)] * 6, [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_only_layers_of_one_scale_and_rank_share_their_products(kinds, together) -> None:
    model, tokens = Sharing(*kinds), mx.zeros((2, 5), mx.int32)
    groups = group_layers_by_input(trace_calls(model))
    places = {id(layer): place for place, layer in enumerate(model.layers)}
    assert [[places[id(layer)] for layer in group] for group in groups] == together
    gradient = nn.value_and_grad(model, lambda tokens: model(tokens))
    expected_value, expected = gradient(tokens)
    with using_optimized_lora_layers(model, groups):
        value, found = gradient(tokens)
    assert value.item() == pytest.approx(expected_value.item(), rel=2e-6)
    assert len(flatten(expected)) == 2 * len(kinds)
    assert largest_difference(flatten(found), flatten(expected)) < 3e-5


def test_layers_whose_factors_are_of_other_dtypes_share_nothing() -> None:
    model, tokens = Sharing(*[(2.0, 4)] * 4), mx.zeros((2, 5), mx.int32)
    model.layers[1].lora_a = model.layers[1].lora_a.astype(mx.bfloat16)
    model.layers[2].lora_b = model.layers[2].lora_b.astype(mx.bfloat16)
    (group,) = group_layers_by_input(trace_calls(model))
    assert list(map(id, group)) == [id(model.layers[0]), id(model.layers[3])]
    expected = model(tokens)
    with using_optimized_lora_layers(model, [group]):
        assert model(tokens).item() == pytest.approx(expected.item(), rel=2e-6)


def test_a_group_lets_go_of_its_input_when_its_last_layer_has_been_asked() -> None:
    model = Sharing((2.0, 4), (2.0, 4))
    with using_optimized_lora_layers(model, [model.layers]):
        mx.eval(model(mx.zeros((2, 5), mx.int32)))
        (group,) = {vars(layer)[GROUP_ATTRIBUTE] for layer in model.layers}
        assert (group._input, group._outputs) == (None, {})


def test_a_group_that_is_given_several_inputs_after_all_computes_each_on_its_own() -> None:
    model = build("llama")
    attention = model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj]
    mx.random.seed(1)
    x, y = mx.random.normal((1, 3, 64)), mx.random.normal((1, 3, 64))
    calls = [(0, x), (0, x), (1, y), (1, x), (0, x), (1, x)]
    expected = [layers[i](given) for i, given in calls]
    with using_optimized_lora_layers(model, [layers]):
        found = [layers[i](given) for i, given in calls]
    assert all(mx.allclose(a, b, atol=1e-5).item() for a, b in zip(found, expected, strict=True))


def test_factors_in_another_dtype_than_the_input_are_computed_as_mlx_lm_does() -> None:
    layer = LoRALinear(16, 8, r=2)
    layer.lora_b = mx.random.normal((2, 8))
    x = mx.random.normal((3, 16)).astype(mx.bfloat16)
    layer.linear.set_dtype(mx.bfloat16)
    expected = layer(x)
    model = nn.Sequential(layer)
    with using_optimized_lora_layers(model):
        assert type(layer) is OptimizedLoRALinear
        found = model(x)
    assert found.dtype == mx.bfloat16
    assert np.array(found.view(mx.uint16)).tobytes() == np.array(expected.view(mx.uint16)).tobytes()


def test_a_float32_base_in_a_bfloat16_model_gives_its_input_a_bfloat16_gradient() -> None:
    """MLX casts nothing on the way back: the kernels below read the gradient as bfloat16."""
    layer = LoRALinear(16, 8, r=8)
    layer.set_dtype(mx.bfloat16)
    layer.linear.weight = mx.random.normal((8, 16))
    layer.lora_b = mx.random.normal((8, 8)).astype(mx.bfloat16)
    model, x = nn.Sequential(layer), mx.random.normal((2, 3, 16)).astype(mx.bfloat16)

    def outputs(x: mx.array) -> mx.array:
        total: mx.array = model(x).astype(mx.float32).sum()
        return total

    (expected,) = mx.vjp(outputs, [x], [mx.array(1.0)])[1]
    with using_optimized_lora_layers(model):
        (found,) = mx.vjp(outputs, [x], [mx.array(1.0)])[1]
    assert found.dtype == mx.bfloat16
    assert mx.allclose(found, expected.astype(mx.bfloat16), rtol=0.02, atol=0.05).item()


def test_modules_parameters_and_names_are_given_back_after_an_error() -> None:
    model = build("llama")
    before = kinds_of(model)

    def are_others() -> None:
        assert any(isinstance(m, OptimizedLoRALinear) for _, m in model.named_modules())
        assert kinds_of(model).keys() == before.keys()

    groups = group_layers_by_input(trace_calls(model))
    leave_by_error(using_optimized_lora_layers(model, groups), are_others)
    assert kinds_of(model) == before
    assert not any(GROUP_ATTRIBUTE in vars(module) for _, module in model.named_modules())
