"""Gated MLPs as one function: mlx-lm's gradients, and what goes to the module itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.activations import swiglu
from mlx_lm.tuner.lora import LoRALinear

from nested_core.optim.gradients import Flat
from nested_core.rooms.cuda import fused_mlp
from nested_core.rooms.cuda.call_tracing import GatedMLP, find_gated_mlps, trace_calls
from nested_core.rooms.cuda.fused_mlp import (
    find_fusable_mlps,
    make_fused_mlp_call,
    using_fused_mlps,
)
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import Outcome, batch, build, largest_difference, outcome, require_near
from tests.arrays import normal

pytestmark = pytest.mark.slow("compares layers and models for CUDA with mlx-lm's")

COMPILES = pytest.mark.slow("compiles another model")
MODELS = [("llama", False), ("qwen2", False), ("granite", False), ("cohere", False)]
MODELS += [("qwen2", True)]


def distance(found: Outcome, exact: Outcome) -> dict[str, float]:
    """The root of the mean square by which each gradient is off, relative to its own."""
    return {
        name: float(
            np.linalg.norm(np.array(found.gradients[name].astype(mx.float32) - value))
            / np.linalg.norm(np.array(value))
        )
        for name, value in exact.gradients.items()
    }


@pytest.mark.parametrize(
    ("name", "quantized"),
    [pytest.param(*each, marks=COMPILES if each[0] != "llama" else []) for each in MODELS],
)
def test_loss_and_gradients_are_no_further_from_float32_than_mlx_lms(
    name: str, quantized: bool, kernel_calls: list[str]
) -> None:
    model = build(name, rank=8, quantized=quantized)
    model.set_dtype(mx.bfloat16)
    theirs = outcome(model, SUPERVISED_LOSS, batch())
    assert kernel_calls == []
    with using_fused_mlps(find_fusable_mlps(trace_calls(model))):
        ours = outcome(model, SUPERVISED_LOSS, batch())
    assert {"forward", "backward"} <= set(kernel_calls)
    model.set_dtype(mx.float32)
    exact = outcome(model, SUPERVISED_LOSS, batch())
    off, usual = distance(ours, exact), distance(theirs, exact)
    assert {name: off[name] for name in off if off[name] > 1.5 * usual[name]} == {}
    assert all(each.dtype == mx.bfloat16 for each in ours.gradients.values())
    assert ours.loss == pytest.approx(exact.loss, rel=2e-3)


class Gated(nn.Module):
    """A gated MLP of LoRA layers, of several ranks, with biases."""

    def __init__(self, *ranks: int, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        widths = (64, 96), (64, 96), (96, 64)
        self.gate, self.up, self.down = (
            LoRALinear(*width, r=rank, scale=scale, bias=bias, dropout=dropout)
            for width, rank, scale in zip(widths, ranks, (2.0, 2.0, 3.0), strict=True)
        )
        for i, layer in enumerate((self.gate, self.up, self.down)):
            layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(i))
            layer.linear.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        output: mx.array = self.down(swiglu(self.gate(x), self.up(x)))
        return output


def of(module: Gated) -> GatedMLP:
    return GatedMLP(module, (module.gate, module.up, module.down))


def make(*ranks: int, dtype: mx.Dtype = mx.float32, **arguments: Any) -> Gated:
    mx.random.seed(0)
    module = Gated(*ranks, **arguments)
    module.set_dtype(dtype)
    return module


def gradients(module: Gated, call: Callable[[mx.array], mx.array], x: mx.array) -> Flat:
    """The output, and gradients with respect to the input and each factor."""
    layers = {"gate": module.gate, "up": module.up, "down": module.down}
    slots = [(layer, f, f"{n}.{f}") for n, layer in layers.items() for f in ("lora_a", "lora_b")]
    held = {name: layer[factor] for layer, factor, name in slots}

    def loss(params: Flat) -> tuple[mx.array, mx.array]:
        for layer, factor, name in slots:
            layer[factor] = params[name]
        output = call(params["x"])
        return (output * normal(*output.shape, dtype=output.dtype, seed=6)).sum(), output

    try:
        (_, output), found = mx.value_and_grad(loss)(held | {"x": x})
    finally:
        for layer, factor, name in slots:
            layer[factor] = held[name]
    result: Flat = found | {"output": output}
    return result


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [(8, 8, 8), (8, 24, 16), (4, 5, 3)], ids=str)
@pytest.mark.parametrize("shape", [(10, 64), (2, 5, 64), (2, 3, 2, 64)], ids=str)
def test_the_function_gives_the_modules_output_and_gradients_in_float32(
    shape: tuple[int, ...], ranks: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = make(*ranks, bias=bias), normal(*shape, dtype=mx.float32)
    expected = gradients(module, module, x)
    own: list[Any] = []
    monkeypatch.setattr(fused_mlp, "can_use_lora_kernels", lambda x, factors: True)
    monkeypatch.setattr(Gated, "__call__", lambda *args: own.append(args))
    found = gradients(module, make_fused_mlp_call(of(module)), x)
    assert own == []
    assert {name: each.shape for name, each in found.items()} == {
        name: each.shape for name, each in expected.items()
    }
    assert largest_difference(found, expected) < 3e-5


def test_a_quantised_base_gives_its_gradients_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make(8, 8, 8), normal(10, 64, dtype=mx.float32)
    nn.quantize(module, group_size=32, bits=4)
    assert isinstance(module.down.linear, nn.QuantizedLinear)
    expected = gradients(module, module, x)
    monkeypatch.setattr(fused_mlp, "can_use_lora_kernels", lambda x, factors: True)
    assert (
        largest_difference(gradients(module, make_fused_mlp_call(of(module)), x), expected) < 3e-5
    )


def test_a_whole_model_in_float32_is_mlx_lms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_mlp, "can_use_lora_kernels", lambda x, factors: True)
    for name, quantized in MODELS:
        model = build(name, quantized=quantized)
        expected = outcome(model, SUPERVISED_LOSS, batch())
        with using_fused_mlps(find_gated_mlps(trace_calls(model))):
            found = outcome(model, SUPERVISED_LOSS, batch())
        require_near(found, expected, loss=2e-6, gradients=3e-5)


@pytest.mark.parametrize(
    ("change", "shape", "dtype"),
    [
        ({}, (3, 5, 64), mx.bfloat16),
        ({}, (10, 64), mx.float32),
        ({}, (10, 64), mx.float16),
        ({"ranks": (4, 4, 4)}, (10, 64), mx.bfloat16),
        ({"ranks": (8, 8, 12)}, (10, 64), mx.bfloat16),
        ({"ranks": (72, 8, 8)}, (10, 64), mx.bfloat16),
        ({"dropout": 0.3}, (10, 64), mx.bfloat16),
    ],
)
def test_what_the_kernels_do_not_take_goes_to_the_module(
    change: dict[str, Any], shape: tuple[int, ...], dtype: mx.Dtype, kernel_calls: list[str]
) -> None:
    arguments = {"ranks": (8, 8, 8)} | change
    module = make(*arguments.pop("ranks"), dtype=dtype, **arguments)
    x = normal(*shape, dtype=dtype)
    mx.random.seed(7)
    expected = module(x)
    mx.random.seed(7)
    assert mx.array_equal(make_fused_mlp_call(of(module))(x), expected).item()
    assert kernel_calls == []


def test_a_dropout_that_is_zero_or_not_training_is_none(kernel_calls: list[str]) -> None:
    x = normal(10, 64, dtype=mx.bfloat16)
    make_fused_mlp_call(of(make(8, 8, 8, dtype=mx.bfloat16)))(x)
    assert kernel_calls.count("forward") == 1
    module = make(8, 8, 8, dtype=mx.bfloat16, dropout=0.3)
    module.eval()
    make_fused_mlp_call(of(module))(x)
    assert kernel_calls.count("forward") == 2
    module.up.train()
    make_fused_mlp_call(of(module))(x)
    assert kernel_calls.count("forward") == 2


def test_factors_of_another_dtype_than_the_input_go_to_the_module(kernel_calls: list[str]) -> None:
    module = make(8, 8, 8, dtype=mx.bfloat16)
    module.up.lora_b = module.up.lora_b.astype(mx.float32)
    x = normal(10, 64, dtype=mx.bfloat16)
    assert mx.array_equal(make_fused_mlp_call(of(module))(x), module(x)).item()
    assert kernel_calls == []
