"""The swiglu kernels' formulas against MLX's own gradients, and which arrays they take."""

from __future__ import annotations

import importlib

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from nested_core.backend import to_float
from nested_core.kernels.patching import replacing_function
from nested_core.rooms.cuda import swiglu
from nested_core.rooms.cuda.call_tracing import plain_swiglu
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import batch, build, largest_difference, outcome
from tests.left_out import slow_except


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_formula_of_the_swiglu_kernel_gives_mlxs_gradients(dtype: mx.Dtype) -> None:
    mx.random.seed(0)
    gate, x, g = (3 * mx.random.normal((64, 48)).astype(dtype) for _ in range(3))
    exact = [each.astype(mx.float32) for each in (gate, x, g)]
    _, expected = mx.vjp(lambda a, b: plain_swiglu(a, b), exact[:2], exact[2:])
    for ours, theirs in zip(swiglu.swiglu_gradients_in_mlx(gate, x, g), expected, strict=True):
        bound = 2e-6 if dtype == mx.float32 else 2**-8  # half a unit in the last place
        assert ours.dtype == dtype
        assert mx.abs(ours - theirs).max().item() <= bound * mx.abs(theirs).max().item()  # type: ignore[operator]


def test_the_functions_with_the_plain_passes_give_mlxs_output_and_gradients() -> None:
    keys = mx.random.split(mx.random.key(0), 3)
    gate, x, g = (mx.random.normal((5, 48), key=key).astype(mx.bfloat16) for key in keys)
    ours = swiglu.make_swiglu(plain_swiglu, swiglu.swiglu_gradients_in_mlx)
    found = mx.vjp(ours, [gate, x], [g])
    expected = mx.vjp(lambda a, b: plain_swiglu(a, b), [gate, x], [g])
    assert mx.array_equal(found[0][0], expected[0][0]).item()
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert mine.dtype == mx.bfloat16
        assert to_float(mx.abs(mine - theirs).max()) <= 0.02 * to_float(mx.abs(theirs).max())


@pytest.mark.parametrize(
    "name",
    slow_except(["llama", "qwen2", "phi3", "gemma2"], "llama", "phi3", reason="compiles kernels"),
)
def test_a_model_whose_code_names_swiglu_gives_the_same_gradients_with_ours(name: str) -> None:
    model = build(name)
    model.set_dtype(mx.bfloat16)
    expected = outcome(model, SUPERVISED_LOSS, batch())
    ours = swiglu.make_swiglu(plain_swiglu, swiglu.swiglu_gradients_in_mlx)
    with replacing_function(model, "swiglu", plain_swiglu, ours):
        used = importlib.import_module(type(model).__module__).__dict__.get("swiglu")
        assert used is not plain_swiglu or name == "gemma2"
        found = outcome(model, SUPERVISED_LOSS, batch())
    assert found.loss == expected.loss
    assert largest_difference(found.gradients, expected.gradients) < 0.05
    assert llama.swiglu is plain_swiglu


def test_arrays_that_the_kernels_do_not_take_go_to_mlx() -> None:
    def unwanted(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        raise AssertionError("the kernel was asked")

    def forward(gate: mx.array, x: mx.array) -> mx.array:
        return unwanted(gate, x)[0]

    one, row = mx.ones((4, 8), mx.bfloat16), mx.ones((1, 8), mx.bfloat16)
    others = [(mx.ones((3, 5), mx.bfloat16),) * 2, (mx.ones((4, 8)),) * 2]
    others += [(one, one.astype(mx.float16)), (one, row)]
    for ours in (
        swiglu.make_swiglu(forward, swiglu.swiglu_gradients_in_mlx),
        swiglu.make_swiglu(plain_swiglu, unwanted),
    ):

        def total(a: mx.array, b: mx.array, ours: swiglu.Swiglu = ours) -> mx.array:
            return ours(a, b).sum()

        for gate, x in others:
            mx.eval(mx.grad(total)(gate, x))
        with pytest.raises(AssertionError, match="was asked"):
            mx.grad(total)(one, one)
