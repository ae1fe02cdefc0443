"""The gated MLP's formulas against MLX's own gradients, and what its kernels are given."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.activations import swiglu

from nested_core.rooms.cuda import gated_mlp, lora_add
from nested_core.rooms.cuda.kernel_launch import MAX_THREADS_PER_BLOCK
from nested_core.rooms.cuda.lora_add import LowRankSumTerms
from tests.arrays import is_near, note_launches

ROUNDING = {mx.float32: 5e-6, mx.bfloat16: 2**-8}  # half a unit in the last place, of bfloat16
RANKS = 8, 24, 16  # of gate, of up, and of the gradient


def sum_of(rank: int, rows: int, width: int, dtype: mx.Dtype, size: float = 1) -> LowRankSumTerms:
    keys = mx.random.split(mx.random.key(rank), 3)
    shapes = (rows, width), (rank, rows), (rank, width)
    base, z, factor = (
        mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True)
    )
    parts = size * base, size * z / rank**0.5, factor
    return LowRankSumTerms(*(each.astype(dtype) for each in parts))


def three(dtype: mx.Dtype = mx.bfloat16, size: float = 1) -> list[LowRankSumTerms]:
    return [sum_of(rank, 20, 96, dtype, size) for rank in RANKS]


@pytest.mark.parametrize("size", [0.1, 1, 4])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_plain_passes_are_mlx_lms_swiglu_and_its_gradients(dtype, size) -> None:
    sums = three(dtype, size)
    gate, up, g = (each.computed_in_float32() for each in sums)
    (output,), (d_gate, d_up) = mx.vjp(lambda a, b: swiglu(a, b), [gate, up], [g])
    found = [gated_mlp.gated_product_in_mlx(*sums[:2]), *gated_mlp.gated_gradients_in_mlx(*sums)]
    for ours, theirs in zip(found, (output, d_gate, d_up, output), strict=True):
        assert ours.dtype == dtype
        assert is_near(ours, theirs, ROUNDING[dtype])


def test_gates_far_from_zero_give_numbers() -> None:
    gate, up, g = three(mx.float32)
    gate = gate._replace(base=gate.base.at[0, :2].add(mx.array([-300.0, 300.0])))
    for each in (
        gated_mlp.gated_product_in_mlx(gate, up),
        *gated_mlp.gated_gradients_in_mlx(gate, up, g),
    ):
        assert mx.isfinite(each).all().item()


def test_a_low_rank_products_gradient_is_that_of_gate_or_up() -> None:
    """z @ d and factor @ d.T: what the caller makes of the gradients, against autodiff."""
    gate, up, g = three(mx.float32)

    def output(*parts: mx.array) -> mx.array:
        one, two = LowRankSumTerms(*parts[:3]), LowRankSumTerms(*parts[3:])
        result: mx.array = swiglu(one.computed_in_float32(), two.computed_in_float32())
        return result

    expected = mx.vjp(output, [*gate, *up], [g.computed_in_float32()])[1]
    d_gate, d_up, _ = gated_mlp.gated_gradients_in_mlx(gate, up, g)
    found = [d_gate, gate.factor @ d_gate.T, gate.z @ d_gate]
    found += [d_up, up.factor @ d_up.T, up.z @ d_up]
    for ours, theirs in zip(found, expected, strict=True):
        assert is_near(ours, theirs, 1e-5)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of kernels; MLX is in their place."""
    calls: list[str] = []

    def forward(*sums: LowRankSumTerms) -> mx.array:
        calls.append("forward")
        return gated_mlp.gated_product_in_mlx(*sums)

    def backward(*sums: LowRankSumTerms) -> gated_mlp.GatedGradients:
        calls.append("backward")
        return gated_mlp.gated_gradients_in_mlx(*sums)

    monkeypatch.setattr(gated_mlp.gated_product_on_cuda, "launch", forward)
    monkeypatch.setattr(gated_mlp.gated_gradients_on_cuda, "launch", backward)
    return calls


def test_bases_of_bfloat16_go_to_the_kernels(kernel_calls: list[str]) -> None:
    sums = three()
    assert mx.array_equal(
        gated_mlp.gated_product(*sums[:2]), gated_mlp.gated_product_in_mlx(*sums[:2])
    ).item()
    found, expected = gated_mlp.gated_gradients(*sums), gated_mlp.gated_gradients_in_mlx(*sums)
    assert all(mx.array_equal(a, b).item() for a, b in zip(found, expected, strict=True))
    assert kernel_calls == ["forward", "backward"]


@pytest.mark.parametrize("other", [mx.float32, mx.float16])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_base_of_another_dtype_goes_to_mlx(place, other, kernel_calls) -> None:
    sums = three()
    sums[place] = sums[place]._replace(base=sums[place].base.astype(other))
    wanted = other if place == 0 else mx.bfloat16
    assert gated_mlp.gated_product(*sums[:2]).dtype == wanted
    assert {each.dtype for each in gated_mlp.gated_gradients(*sums)} == {wanted}
    assert kernel_calls == ([] if place < 2 else ["forward"])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each launch was given; it gives zeros."""
    return note_launches(gated_mlp, monkeypatch)


def test_a_launch_has_each_sums_arrays_and_tiles_and_fills_arrays_like_gates(launched) -> None:
    sums = three()
    assert gated_mlp.gated_product_on_cuda(*sums[:2]).shape == (20, 96)
    assert [each.shape for each in gated_mlp.gated_gradients_on_cuda(*sums)] == [(20, 96)] * 3
    for given, taken, outputs in zip(launched, (sums[:2], sums), (1, 3), strict=True):
        arrays = [array for each in taken for array in each]
        assert list(map(id, given["inputs"])) == list(map(id, arrays))
        assert given["outputs"] == [((20, 96), mx.bfloat16)] * outputs
        assert given["numbers"] == [20, 1, 96, *(rank // 8 for rank in RANKS[: len(taken)])]
        assert given["blocks"] == (1, 2)
        assert given["MOST"] == 3
        assert "threads" not in given, "a block has as many as launch_kernel gives it"
    assert [each["name"] for each in launched] == ["gated_product", "gated_gradients"]


@pytest.mark.slow("computes the largest check without a GPU")
def test_the_check_has_rows_left_over_and_warps_that_take_rows_more_than_once(launched) -> None:
    for kernel in (gated_mlp.gated_product_on_cuda, gated_mlp.gated_gradients_on_cuda):
        assert str(kernel.describe_disagreement(4)).startswith("it differs by")
    assert len(launched) == 2
    for given in launched:
        rows, steps, width, *tiles = given["numbers"]
        assert steps > 1
        assert rows % lora_add.WARP_ROWS != 0
        assert width % (lora_add.WARP_COLUMNS * MAX_THREADS_PER_BLOCK // 32) != 0
        assert tiles == [4, 1, 1][: len(tiles)]
        assert given["MOST"] == 4
