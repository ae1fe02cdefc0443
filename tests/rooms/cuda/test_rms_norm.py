"""RMS norms with a backward pass for x alone: its gradient, and which norms are left alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from nested_core import backend
from nested_core.backend import to_float
from nested_core.rooms.cuda import rms_norm
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import batch, build, kinds_of, largest_difference, leave_by_error, outcome
from tests.arrays import normal, note_launches
from tests.left_out import slow_except

WIDTH = 40


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with CUDA whose kernel agrees with MLX, and MLX's operations in its place."""
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    kernel = rms_norm.input_gradient_on_cuda
    monkeypatch.setattr(kernel, "agrees_with_reference", lambda *variant: True)
    monkeypatch.setattr(kernel, "launch", kernel.reference)


def make(width: int = WIDTH, dtype: mx.Dtype = mx.bfloat16) -> nn.RMSNorm:
    module = nn.RMSNorm(width, eps=1e-3)
    module.weight = mx.random.normal((width,), key=mx.random.key(5)).astype(dtype)
    module.freeze()
    return module


def forbidden(x: mx.array, weight: mx.array, eps: float, g: mx.array) -> mx.array:
    raise AssertionError("the kernel was asked")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_norm_with_the_plain_backward_pass_is_mlxs_to_the_bit(dtype: mx.Dtype) -> None:
    module = make(dtype=dtype)
    x, g = normal(3, 5, WIDTH, dtype=dtype), normal(3, 5, WIDTH, dtype=dtype, seed=1)
    found = mx.vjp(rms_norm.make_norm_call(module, rms_norm.input_gradient_in_mlx), [x], [g])
    expected = mx.vjp(lambda x: module(x), [x], [g])
    for ours, theirs in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert ours.dtype == dtype
        assert mx.array_equal(ours, theirs).item()


def test_the_plain_backward_pass_is_the_formulas() -> None:
    x, w, g = normal(5, 2600), normal(2600, seed=1), normal(5, 2600, seed=2)
    a, b, c = (each.astype(mx.float32) for each in (x, w, g))
    i = mx.rsqrt((a * a).mean(-1, keepdims=True) + 1e-5)
    expected = b * c * i - a * i**3 * (b * c * a).mean(-1, keepdims=True)
    found = rms_norm.input_gradient_in_mlx(x, w, 1e-5, g)
    assert to_float(mx.abs(found - expected).max()) <= 2**-8 * to_float(mx.abs(expected).max())


@pytest.mark.parametrize(
    ("width", "dtype", "of_weight"),
    [
        (36, mx.bfloat16, mx.bfloat16),
        (rms_norm.LONGEST_ROW + 8, mx.bfloat16, mx.bfloat16),
        (WIDTH, mx.float32, mx.float32),
        (WIDTH, mx.bfloat16, mx.float32),
        (WIDTH, mx.float16, mx.bfloat16),
    ],
)
def test_arrays_that_the_kernel_does_not_take_go_to_mlx(width, dtype, of_weight) -> None:
    module = make(width, of_weight)
    call = rms_norm.make_norm_call(module, forbidden)
    x = normal(2, width, dtype=dtype)
    ours, theirs = (mx.grad(lambda x, f=f: f(x).sum())(x) for f in (call, module))
    assert mx.array_equal(call(x), module(x)).item()
    assert mx.array_equal(ours, theirs).item()


@pytest.mark.parametrize("width", [WIDTH, rms_norm.LONGEST_ROW])
def test_arrays_that_the_kernel_takes_go_to_it(width: int) -> None:
    call = rms_norm.make_norm_call(make(width), forbidden)
    with pytest.raises(AssertionError, match="was asked"):
        mx.grad(lambda x: call(x).sum())(normal(2, width))


@pytest.mark.parametrize(("rows", "blocks"), [(3, 3), (1056, 1056), (1057, 1056), (5000, 1056)])
def test_a_launch_has_a_block_a_row_up_to_a_number_from_which_each_takes_several(
    rows: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = note_launches(rms_norm, monkeypatch)
    shape = (rows, 1, WIDTH)
    found = rms_norm.input_gradient_on_cuda(mx.zeros(shape), mx.zeros(WIDTH), 1e-5, mx.zeros(shape))
    assert found.shape == shape
    (given,) = launches
    assert given["blocks"] == (blocks, 1)
    assert given["numbers"] == [rows, WIDTH, 1e-5]


@pytest.mark.parametrize(
    ("width", "threads", "packs"),
    [(8, 32, 1), (264, 64, 1), (1024, 128, 1), (1032, 128, 2), (5000, 128, 8)],
)
def test_a_blocks_threads_take_a_whole_row(width, threads, packs, monkeypatch) -> None:
    launches, rows = note_launches(rms_norm, monkeypatch), mx.zeros((2, width))
    rms_norm.input_gradient_on_cuda(rows, mx.zeros(width), 1e-5, rows)
    (given,) = launches
    assert (given["threads"], given["PACKS"]) == (threads, packs)
    assert threads * packs * 8 >= width


class SomeNorm(nn.RMSNorm):
    """A norm of its own making, such as Gemma's."""


def several() -> Any:
    model = nn.Module()
    model.frozen, model.trained, model.other = make(), make(), SomeNorm(WIDTH)
    model.other.freeze()
    model.trained.unfreeze()
    model.layers = [nn.LayerNorm(WIDTH), make()]
    model.layers[0].freeze()
    return model


@pytest.mark.usefixtures("on_cuda")
def test_only_frozen_rms_norms_are_replaced_and_given_back() -> None:
    model = several()
    before = kinds_of(model)
    with rms_norm.using_frozen_norms(model):
        inside = kinds_of(model)
    assert {n for n, kind in inside.items() if kind != before[n]} == {"frozen", "layers.1"}
    assert kinds_of(model) == before


@pytest.mark.usefixtures("on_cuda")
def test_norms_are_given_back_after_an_error() -> None:
    model = several()

    def is_another() -> None:
        assert type(model.frozen) is not nn.RMSNorm

    leave_by_error(rms_norm.using_frozen_norms(model), is_another)
    assert type(model.frozen) is nn.RMSNorm


@pytest.mark.usefixtures("on_cuda")
def test_a_trained_weight_keeps_its_gradient() -> None:
    model, x = several(), normal(3, WIDTH)

    def loss(weight: mx.array) -> mx.array:
        model.trained.weight = weight
        total: mx.array = (model.trained(model.frozen(x)) * x).sum()
        return total

    expected = mx.grad(loss)(mx.ones(WIDTH, mx.bfloat16))
    with rms_norm.using_frozen_norms(model):
        found = mx.grad(loss)(mx.ones(WIDTH, mx.bfloat16))
    assert mx.array_equal(found, expected).item()
    assert to_float(mx.abs(found).max()) > 0


def test_without_cuda_or_with_a_kernel_that_disagrees_norms_stay(monkeypatch) -> None:
    model = several()
    for has_cuda, agrees in ((False, True), (True, False)):
        monkeypatch.setattr(backend, "computes_on_cuda", lambda has=has_cuda: has)
        kernel = rms_norm.input_gradient_on_cuda
        monkeypatch.setattr(kernel, "agrees_with_reference", lambda _, agrees=agrees: agrees)
        with rms_norm.using_frozen_norms(model):
            assert type(model.frozen) is nn.RMSNorm


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    "name",
    slow_except(["llama", "qwen3", "phi3"], "llama", "qwen3", reason="compiles another model"),
)
def test_a_model_with_its_frozen_norms_replaced_gives_the_same_gradients(name: str) -> None:
    model = build(name)
    model.set_dtype(mx.bfloat16)
    expected = outcome(model, SUPERVISED_LOSS, batch())
    with rms_norm.using_frozen_norms(model):
        assert type(model.layers[0].input_layernorm) is not nn.RMSNorm
        found = outcome(model, SUPERVISED_LOSS, batch())
    assert found.loss == expected.loss
    assert largest_difference(found.gradients, expected.gradients) < 0.02
