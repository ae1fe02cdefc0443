"""swiglu on a CPU against MLX's own gradients."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from nested_core import backend
from nested_core.kernels import swiglu
from tests.architectures import build


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
    with swiglu.using_cpu_swiglu(model):
        assert llama.swiglu is swiglu.swiglu_on_cpu
    assert llama.swiglu is swiglu.plain_swiglu
