"""Sums of low-rank layers: the formula, which arrays the kernel takes, and what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest

from nested_core import backend
from nested_core.rooms.cuda import lora_add
from nested_core.rooms.cuda.kernel_launch import COMPILED_TILE_COUNTS, MAX_THREADS_PER_BLOCK
from nested_core.rooms.cuda.lora_add import LowRankSumTerms
from tests.arrays import is_near, normal, note_launches

ROUNDING = {mx.float32: 2e-6, mx.bfloat16: 2**-8}  # half a unit in the last place, of bfloat16


def sums_of(
    *sizes: tuple[int, int], rows: int = 6, dtype: mx.Dtype = mx.bfloat16
) -> list[LowRankSumTerms]:
    """A sum for each rank and width."""
    return [
        LowRankSumTerms(
            normal(rows, width, dtype=dtype, seed=3 * i),
            normal(rank, rows, dtype=dtype, seed=3 * i + 1),
            normal(rank, width, dtype=dtype, seed=3 * i + 2),
        )
        for i, (rank, width) in enumerate(sizes)
    ]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine whose kernels agree; the tiles that they were checked for."""
    kernel_calls: list[int] = []

    def agrees(most: int) -> bool:
        kernel_calls.append(most)
        return True

    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    monkeypatch.setattr(lora_add.low_rank_sums_on_cuda, "agrees_with_reference", agrees)
    return kernel_calls


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each launch was given; it gives zeros."""
    return note_launches(lora_add, monkeypatch)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_plain_sum_is_a_matmul_on_top_of_the_base(dtype: mx.Dtype) -> None:
    sums = sums_of((8, 64), (24, 96), dtype=dtype)
    for found, (base, z, factor) in zip(lora_add.low_rank_sums_in_mlx(sums), sums, strict=True):
        exact = [each.astype(mx.float32) for each in (base, z, factor)]
        assert found.dtype == dtype
        assert is_near(found, mx.addmm(exact[0], exact[1].T, exact[2]), ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_layers_output_and_its_inputs_gradient_are_such_sums(dtype: mx.Dtype) -> None:
    shapes = (6, 40), (40, 64), (40, 8), (8, 64), (6, 64)
    exact = [normal(*shape, seed=i).astype(mx.float32) for i, shape in enumerate(shapes)]
    x, weight, a, b, g = exact
    (y,), (dx,) = mx.vjp(lambda x: x @ weight + 1.5 * (x @ a) @ b, [x], [g])
    output = x @ weight, 1.5 * (x @ a).T, b
    gradient = g @ weight.T, 1.5 * (g @ b.T).T, a.T
    for parts, expected in ((output, y), (gradient, dx)):
        (found,) = lora_add.low_rank_sums_in_mlx(
            [LowRankSumTerms(*(each.astype(dtype) for each in parts))]
        )
        assert is_near(found, expected, 4 * ROUNDING[dtype])


@pytest.mark.parametrize("rank", [8, 16, 24, 40, 64])
def test_bfloat16_arrays_of_whole_tiles_are_for_the_kernels(rank: int, on_cuda: list[int]) -> None:
    x = normal(2, 3, 40)
    assert lora_add.can_use_lora_kernels(x, [normal(8, 32), normal(rank, 160)])
    assert set(on_cuda) == {1, min(most for most in COMPILED_TILE_COUNTS if 8 * most >= rank)}


@pytest.mark.parametrize(
    ("shape", "dtypes", "factor"),
    [
        ((6, 40), (mx.float32, mx.bfloat16), (8, 64)),
        ((6, 40), (mx.bfloat16, mx.float32), (8, 64)),
        ((6, 40), (mx.float32, mx.float32), (8, 64)),
        ((6, 40), (mx.float16, mx.float16), (8, 64)),
        ((5, 40), (mx.bfloat16, mx.bfloat16), (8, 64)),
        ((3, 5, 40), (mx.bfloat16, mx.bfloat16), (8, 64)),
        ((40,), (mx.bfloat16, mx.bfloat16), (8, 64)),
        ((6, 40), (mx.bfloat16, mx.bfloat16), (4, 64)),
        ((6, 40), (mx.bfloat16, mx.bfloat16), (12, 64)),
        ((6, 40), (mx.bfloat16, mx.bfloat16), (72, 64)),
        ((6, 40), (mx.bfloat16, mx.bfloat16), (8, 48)),
        ((6, 40), (mx.bfloat16, mx.bfloat16), (8, 65)),
    ],
)
@pytest.mark.usefixtures("on_cuda")
def test_other_dtypes_odd_rows_other_ranks_and_uneven_widths_are_not(shape, dtypes, factor) -> None:
    fits, other = normal(8, 64), normal(*factor, dtype=dtypes[1])
    x = normal(*shape, dtype=dtypes[0])
    for factors in ([other], [fits, other], [other, fits]):
        assert not lora_add.can_use_lora_kernels(x, factors)


def test_without_cuda_or_a_kernel_that_agrees_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    x, factor = normal(6, 40), normal(8, 64)
    for has_cuda, agrees, is_taken in ((1, 1, True), (0, 1, False), (1, 0, False)):
        monkeypatch.setattr(backend, "computes_on_cuda", lambda has=has_cuda: bool(has))
        kernel = lora_add.low_rank_sums_on_cuda
        monkeypatch.setattr(kernel, "agrees_with_reference", lambda _, agrees=agrees: bool(agrees))
        assert lora_add.can_use_lora_kernels(x, [factor]) is is_taken


@pytest.mark.parametrize("bad", COMPILED_TILE_COUNTS)
def test_factors_are_not_for_kernels_of_which_one_disagrees(bad, monkeypatch) -> None:
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    monkeypatch.setattr(
        lora_add.low_rank_sums_on_cuda, "agrees_with_reference", lambda tiles: tiles != bad
    )
    for other in (8, 64):
        assert not lora_add.can_use_lora_kernels(
            normal(6, 40), [normal(8 * bad, 64), normal(other, 64)]
        )


def test_a_base_of_another_dtype_takes_all_sums_to_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_calls = []

    def note(sums: lora_add.Sums) -> Sequence[mx.array]:
        kernel_calls.append(len(sums))
        return lora_add.low_rank_sums_in_mlx(sums)

    monkeypatch.setattr(lora_add.low_rank_sums_on_cuda, "launch", note)
    sums = sums_of((8, 64), (8, 96))
    lora_add.compute_low_rank_sums(sums)
    assert kernel_calls == [2]
    sums[1] = sums[1]._replace(base=sums[1].base.astype(mx.float32))
    found = lora_add.compute_low_rank_sums(sums)
    assert kernel_calls == [2]
    assert [each.dtype for each in found] == [mx.bfloat16, mx.float32]
    assert mx.array_equal(found[1], sums[1].computed_in_float32()).item()


@pytest.mark.parametrize(
    ("count", "groups"), [(1, [1]), (3, [3]), (4, [4]), (5, [4, 1]), (9, [4, 4, 1])]
)
def test_a_launch_has_four_sums_of_which_some_are_of_no_size(count, groups, launched) -> None:
    sums = sums_of(*[(8 + 8 * (i % 3), 64 + 32 * i) for i in range(count)])
    found = lora_add.low_rank_sums_on_cuda(sums)
    assert [each.shape for each in found] == [each.base.shape for each in sums]
    assert [each["blocks"][2] for each in launched] == groups
    for start, given in zip(range(0, count, 4), launched, strict=True):
        group = sums[start : start + 4]
        missing = 4 - len(group)
        arrays = [array for each in [*group, *[group[0]] * missing] for array in each]
        assert given["name"] == "low_rank_sums"
        assert list(map(id, given["inputs"])) == list(map(id, arrays))
        shapes = [each.base.shape for each in group] + [(0,)] * missing
        assert given["outputs"] == [(shape, mx.bfloat16) for shape in shapes]
        sizes = [(len(each.factor) // 8, each.base.shape[1]) for each in group]
        given_sizes = [size for pair in sizes + [(0, 0)] * missing for size in pair]
        assert given["numbers"] == [6, 1, *given_sizes]
        assert given["MOST"] == max(tiles for tiles, _ in sizes)
        assert "threads" not in given, "a block has as many as launch_kernel gives it"
        assert 256 * given["blocks"][0] >= max(width for _, width in sizes)


@pytest.mark.parametrize("width", [32, 64, 256, 288, 896, 4096, 14336, 151936])
def test_a_grid_covers_every_row_and_column_and_no_block_is_for_nothing(width: int) -> None:
    for rows in [*range(2, 130, 2), 510, 2010, 2048, 4098, 16384, 65534, 1_000_000]:
        steps, (across, down) = lora_add.warp_steps_and_grid(rows, width)
        assert 1 <= steps <= lora_add.MAX_STEPS_PER_WARP
        assert steps * lora_add.WARP_ROWS * (down - 1) < rows <= steps * lora_add.WARP_ROWS * down
        columns = lora_add.WARP_COLUMNS * MAX_THREADS_PER_BLOCK // 32
        assert columns * (across - 1) < width <= columns * across
        assert down <= 65535
        assert steps == 1 or across * down >= lora_add.MIN_BLOCKS // 2


def test_the_check_has_rows_left_over_and_warps_that_take_rows_more_than_once(launched) -> None:
    assert str(lora_add.low_rank_sums_on_cuda.describe_disagreement(3)).startswith("it differs by")
    (given,) = launched
    rows, steps, *sizes = given["numbers"]
    assert steps > 1
    assert rows % lora_add.WARP_ROWS != 0
    assert sizes == [3, 160, 1, 4128, 0, 0, 0, 0]
