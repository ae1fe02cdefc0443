"""Our kernels' formulas against MLX's own gradients, and what becomes of one that is wrong."""

from __future__ import annotations

import importlib
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama

from nested_core import backend
from nested_core.kernels import attention, swiglu
from nested_core.kernels.exponential import exponential
from nested_core.kernels.replacing import in_code_of
from nested_core.training.compute import prepared
from nested_core.training.losses import SUPERVISED
from tests.architectures import batch, build, largest_difference, outcome


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_formula_of_the_swiglu_kernel_gives_mlxs_gradients(dtype: mx.Dtype) -> None:
    mx.random.seed(0)
    gate, x, g = (3 * mx.random.normal((64, 48)).astype(dtype) for _ in range(3))
    exact = [each.astype(mx.float32) for each in (gate, x, g)]
    _, expected = mx.vjp(lambda a, b: swiglu.plain_swiglu(a, b), exact[:2], exact[2:])
    for ours, theirs in zip(swiglu.backward(gate, x, g), expected, strict=True):
        bound = 2e-6 if dtype == mx.float32 else 2**-8  # half a unit in the last place
        assert ours.dtype == dtype
        assert mx.abs(ours - theirs).max().item() <= bound * mx.abs(theirs).max().item()  # type: ignore[operator]


def test_the_check_accepts_the_formula() -> None:
    assert swiglu.disagreement(swiglu.backward) is None


def test_the_check_finds_a_wrong_gradient() -> None:
    def wrong(gate: mx.array, x: mx.array, g: mx.array) -> tuple[mx.array, mx.array]:
        d_gate, d_x = swiglu.backward(gate, x, g)
        return 1.05 * d_gate, d_x

    assert "it differs by" in str(swiglu.disagreement(wrong))


def test_the_check_finds_a_gradient_that_is_not_a_number() -> None:
    def broken(gate: mx.array, x: mx.array, g: mx.array) -> tuple[mx.array, mx.array]:
        return g * float("nan"), x

    assert "it differs by nan" in str(swiglu.disagreement(broken))


def test_the_check_tells_of_a_kernel_that_does_not_run() -> None:
    def failing(gate: mx.array, x: mx.array, g: mx.array) -> tuple[mx.array, mx.array]:
        raise RuntimeError("nvrtc: no such\n  compiler")

    assert swiglu.disagreement(failing) == "it failed: nvrtc: no such compiler"


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma2"])
def test_a_model_whose_code_names_swiglu_gives_the_same_gradients_with_ours(name: str) -> None:
    model = build(name)
    model.set_dtype(mx.bfloat16)
    expected = outcome(model, SUPERVISED, batch())
    ours = swiglu.swiglu_with(swiglu.backward)
    with in_code_of(model, "swiglu", swiglu.plain_swiglu, ours):
        used = importlib.import_module(type(model).__module__).__dict__.get("swiglu")
        assert used is not swiglu.plain_swiglu or name == "gemma2"
        found = outcome(model, SUPERVISED, batch())
    assert found.loss == expected.loss
    assert largest_difference(found.gradients, expected.gradients) < 0.05
    assert llama.swiglu is swiglu.plain_swiglu


def test_arrays_that_the_kernel_does_not_take_go_to_mlx() -> None:
    def unwanted(gate: mx.array, x: mx.array, g: mx.array) -> tuple[mx.array, mx.array]:
        raise AssertionError("the kernel was asked")

    ours = swiglu.swiglu_with(unwanted)
    for shape, dtype in (((3, 5), mx.bfloat16), ((4, 8), mx.float32)):
        gate = mx.ones(shape, dtype)
        mx.eval(mx.grad(lambda a: ours(a, a).sum())(gate))
    with pytest.raises(AssertionError, match="was asked"):
        mx.grad(lambda a: ours(a, a).sum())(mx.ones((4, 8), mx.bfloat16))


def test_on_a_cpu_the_sigmoid_is_kept_and_the_gradients_are_mlxs() -> None:
    mx.random.seed(0)
    gate, x, g = (3 * mx.random.normal((64, 48)) for _ in range(3))
    gate[0, :2] = mx.array([-200.0, 200.0])
    outputs, gradients = mx.vjp(swiglu.swiglu_on_cpu, [gate, x], [g])
    expected = mx.vjp(lambda a, b: swiglu.plain_swiglu(a, b), [gate, x], [g])
    for ours, theirs in zip(outputs + gradients, expected[0] + expected[1], strict=True):
        assert mx.abs(ours - theirs).max().item() <= 1e-6 * mx.abs(theirs).max().item()  # type: ignore[operator]


@pytest.mark.skipif(backend.device() != "cpu", reason="about a CPU")
def test_the_models_code_has_our_swiglu_while_the_block_runs() -> None:
    model = build("llama")
    with swiglu.fused_swiglu(model):
        assert llama.swiglu is swiglu.swiglu_on_cpu
    assert llama.swiglu is swiglu.plain_swiglu


@pytest.mark.skipif(not backend.has_cuda(), reason="needs a CUDA device")
def test_on_cuda_the_kernel_agrees_with_mlx() -> None:
    assert swiglu.disagreement(swiglu.backward_on_cuda) is None


@pytest.mark.parametrize("length", [63, 64, 65, 130])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_causal_attention_in_blocks_gives_mlxs_output_and_gradients(
    length: int, kv_heads: int
) -> None:
    mx.random.seed(0)
    queries, g = (mx.random.normal((2, 4, length, 8)) for _ in range(2))
    keys, values = (mx.random.normal((2, kv_heads, length, 8)) for _ in range(2))

    def attend(function: Any) -> Any:
        return mx.vjp(
            lambda *qkv: function(*qkv, None, 0.3, "causal"), [queries, keys, values], [g]
        )

    found, expected = attend(attention.causal_attention), attend(attention.plain_attention)
    for ours, theirs in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert mx.abs(ours - theirs).max().item() <= 2e-6 * mx.abs(theirs).max().item()  # type: ignore[operator]


def test_other_masks_and_lengths_go_to_mlx_lm_as_they_are() -> None:
    x = mx.random.normal((1, 2, 64, 8))
    for mask in (None, mx.ones((64, 64), mx.bool_)):
        found = attention.causal_attention(x, x, x, None, 0.3, mask)
        assert mx.array_equal(found, attention.plain_attention(x, x, x, None, 0.3, mask)).item()
    last = attention.causal_attention(x[:, :, -1:], x, x, None, 0.3, "causal")
    assert mx.array_equal(
        last, attention.plain_attention(x[:, :, -1:], x, x, None, 0.3, "causal")
    ).item()


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma3_text"])
def test_a_prepared_model_gives_mlx_lms_loss_and_gradients(name: str) -> None:
    model = build(name)
    given = batch(rows=2, width=80)
    expected = outcome(model, SUPERVISED, given)
    kinds = {name: type(module) for name, module in model.named_modules()}
    with prepared(model):
        found = outcome(model, SUPERVISED, given)
        plain = outcome(model, SUPERVISED, given, compiled=lambda function: function)
    assert found.loss == pytest.approx(expected.loss, rel=2e-6)
    assert largest_difference(found.gradients, expected.gradients) < 3e-5
    assert plain.loss == found.loss
    assert largest_difference(found.gradients, plain.gradients) == 0
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert llama.scaled_dot_product_attention is attention.plain_attention


def test_the_exponential_is_right_within_the_rounding_of_its_argument() -> None:
    x = mx.concatenate([mx.linspace(-80, 80, 10_001), mx.array([-math.inf, 0.0, math.inf])])
    exact, found = np.exp(np.array(x).astype(np.float64)), np.array(exponential(x))
    assert found[-3:].tolist() == [0.0, 1.0, math.inf]
    units = np.abs(found[:-3] / exact[:-3] - 1) / np.finfo(np.float32).eps
    assert (units <= np.abs(np.array(x[:-3])) + 1).all()
