"""Products of low-rank layers: the formulas, and which arrays the kernels are given."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import mlx.core as mx
import pytest

from nested_core import backend
from nested_core.kernels.device_operations import has_kernel_for_rank
from nested_core.rooms.cuda import lora_matmuls
from nested_core.rooms.cuda.kernel_launch import (
    COMPILED_TILE_COUNTS,
    MAX_THREADS_PER_BLOCK,
    tiles_of_smallest_kernel,
)
from nested_core.rooms.cuda.lora_matmuls import (
    Pairs,
    factor_gradients_in_mlx,
    project_to_rank_in_mlx,
)
from tests.arrays import normal

SIZES = ((8, 64), (16, 128), (8, 192), (64, 64), (24, 128), (8, 64))  # rank and width


def narrow_pairs(
    *sizes: tuple[int, int], rows: int = 6, dtype: mx.Dtype = mx.bfloat16
) -> list[tuple[mx.array, mx.array]]:
    return [
        (normal(r, w, dtype=dtype, seed=i), normal(rows, w, dtype=dtype, seed=9 + i))
        for i, (r, w) in enumerate(sizes)
    ]


def outer_pairs(
    *sizes: tuple[int, int], rows: int = 6, dtype: mx.Dtype = mx.bfloat16
) -> list[tuple[mx.array, mx.array]]:
    return [
        (normal(r, rows, dtype=dtype, seed=i), normal(rows, w, dtype=dtype, seed=9 + i))
        for i, (r, w) in enumerate(sizes)
    ]


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A machine whose kernels agree, MLX in their place; which was given how many pairs."""
    calls: list[tuple[str, int]] = []

    def narrow(pairs: Pairs, scale: float) -> mx.array:
        calls.append(("project_to_rank", len(pairs)))
        return project_to_rank_in_mlx(pairs, scale)

    def outer(pairs: Pairs) -> Sequence[mx.array]:
        calls.append(("factor_gradients", len(pairs)))
        return factor_gradients_in_mlx(pairs)

    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    monkeypatch.setattr(
        lora_matmuls.project_to_rank_on_cuda, "agrees_with_reference", lambda tiles: True
    )
    monkeypatch.setattr(
        lora_matmuls.factor_gradients_on_cuda, "agrees_with_reference", lambda tiles: True
    )
    monkeypatch.setattr(lora_matmuls.project_to_rank_on_cuda, "launch", narrow)
    monkeypatch.setattr(lora_matmuls.factor_gradients_on_cuda, "launch", outer)
    return calls


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6])
def test_products_are_the_formulas_for_any_number_of_pairs(count: int) -> None:
    pairs = narrow_pairs(*SIZES[:count], dtype=mx.float32)
    found = lora_matmuls.project_to_rank(pairs, 1.5)
    expected = mx.concatenate([1.5 * (m @ x.T) for m, x in pairs])
    assert found.shape == (sum(rank for rank, _ in SIZES[:count]), 6)
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5).item()
    pairs = outer_pairs(*SIZES[:count], dtype=mx.float32)
    for product, (z, x) in zip(lora_matmuls.factor_gradients(pairs), pairs, strict=True):
        assert mx.array_equal(product, z @ x).item()


@pytest.mark.parametrize(("count", "each"), [(1, [1]), (4, [4]), (5, [4, 1]), (6, [4, 2])])
def test_arrays_that_fit_go_to_the_kernels_at_most_four_pairs_at_once(
    count: int, each: list[int], kernel_calls: list[tuple[str, int]]
) -> None:
    pairs = narrow_pairs(*SIZES[:count])
    expected = mx.concatenate([1.5 * (m @ x.T) for m, x in pairs])
    assert mx.array_equal(lora_matmuls.project_to_rank(pairs, 1.5), expected).item()
    alike = [(8, width) for _, width in SIZES[:count]]
    products = outer_pairs(*alike)
    found = lora_matmuls.factor_gradients(products)
    assert [product.shape for product in found] == alike
    for product, (z, x) in zip(found, products, strict=True):
        assert mx.array_equal(product, z @ x).item()
    assert kernel_calls == [("project_to_rank", n) for n in each] + [
        ("factor_gradients", n) for n in each
    ]


@pytest.mark.parametrize(
    "ranks",
    [[16, 8, 8, 8, 8], [16, 8, 8, 16], [8] * 6 + [64], [24, 24, 8, 8, 8, 8, 8, 40]],
    ids=str,
)
def test_neighbours_of_one_rank_go_to_a_kernel_together_and_come_back_in_their_order(
    ranks: list[int], kernel_calls: list[tuple[str, int]]
) -> None:
    pairs = outer_pairs(*[(rank, 64 + 64 * (i % 3)) for i, rank in enumerate(ranks)])
    found = lora_matmuls.factor_gradients(pairs)
    for product, (z, x) in zip(found, pairs, strict=True):
        assert mx.array_equal(product, z @ x).item()
    runs = [len(list(run)) for _, run in groupby(ranks)]
    assert kernel_calls == [
        ("factor_gradients", min(4, n - i)) for n in runs for i in range(0, n, 4)
    ]


@pytest.mark.parametrize("bad", COMPILED_TILE_COUNTS)
def test_no_kernel_is_used_that_disagrees_whatever_it_comes_with(
    bad: int, kernel_calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        lora_matmuls.factor_gradients_on_cuda, "agrees_with_reference", lambda tiles: tiles != bad
    )
    for other in (8, 64):
        lora_matmuls.factor_gradients(outer_pairs((other, 64), (8 * bad, 64)))
        lora_matmuls.factor_gradients(outer_pairs((8 * bad, 64), (other, 64)))
    assert kernel_calls == []


@pytest.mark.parametrize(
    ("rows", "takers"),
    [
        (1, ["project_to_rank"]),
        (5, ["project_to_rank"]),
        (2, ["project_to_rank", "factor_gradients"]),
    ],
)
def test_an_odd_number_of_rows_goes_to_mlx_only_where_rows_are_summed(
    rows: int, takers: list[str], kernel_calls: list[tuple[str, int]]
) -> None:
    lora_matmuls.project_to_rank(narrow_pairs((8, 64), rows=rows), 1.0)
    lora_matmuls.factor_gradients(outer_pairs((8, 64), rows=rows))
    assert [name for name, _ in kernel_calls] == takers


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((8, 64), mx.float32),
        ((12, 64), mx.bfloat16),
        ((72, 64), mx.bfloat16),
        ((8, 40), mx.bfloat16),
    ],
)
def test_arrays_that_do_not_fit_go_to_mlx_with_all_that_come_with_them(
    size: tuple[int, int], dtype: mx.Dtype, kernel_calls: list[tuple[str, int]]
) -> None:
    for sizes in ([size], [(8, 64), size], [size, (8, 64)]):
        lora_matmuls.project_to_rank(narrow_pairs(*sizes, dtype=dtype), 2.0)
        lora_matmuls.factor_gradients(outer_pairs(*sizes, dtype=dtype))
    assert kernel_calls == []


def test_pairs_of_several_dtypes_go_to_mlx(kernel_calls: list[tuple[str, int]]) -> None:
    (m, x), other = narrow_pairs((8, 64))[0], narrow_pairs((8, 64), dtype=mx.float16)
    lora_matmuls.project_to_rank([(m, x.astype(mx.float16))], 1.0)
    lora_matmuls.project_to_rank([(m, x), *other], 1.0)
    assert kernel_calls == []


def test_a_width_of_half_a_block_of_columns_fits_only_where_columns_are_summed(
    kernel_calls: list[tuple[str, int]],
) -> None:
    lora_matmuls.project_to_rank(narrow_pairs((8, 96)), 1.0)
    lora_matmuls.factor_gradients(outer_pairs((8, 96)))
    assert kernel_calls == [("project_to_rank", 1)]


def test_a_launch_has_four_pairs_of_which_some_are_of_no_height() -> None:
    pairs = narrow_pairs((24, 128), (8, 192))
    (a, x), (b, y) = pairs
    arrays = lora_matmuls._pad_to_pairs_per_launch(pairs)
    assert [id(each) for each in arrays] == list(map(id, [a, x, b, y, a, x, a, x]))
    assert lora_matmuls._tiles_and_widths(pairs) == [3, 128, 1, 192, 0, 0, 0, 0]
    assert lora_matmuls._kernel_tiles_for_pairs(pairs) == 3


def test_the_check_has_odd_rows_rows_in_several_splits_and_widths_beyond_what_the_warps_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def note(name: str, inputs: Sequence[mx.array], outputs: Any, *_: Any, **__: Any) -> Any:
        shapes[name] = [array.shape for array in inputs] + [shape for shape, _ in outputs]
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(lora_matmuls, "launch_kernel", note)
    for kernel in (lora_matmuls.project_to_rank_on_cuda, lora_matmuls.factor_gradients_on_cuda):
        assert str(kernel.describe_disagreement(3)).startswith("it differs by")
    warps = MAX_THREADS_PER_BLOCK // 32
    assert (
        min(width for _, width in shapes["project_to_rank"][:-1])
        > lora_matmuls.WARP_COLUMNS_READ * warps
    )
    assert shapes["project_to_rank"][1][0] % 2 == 1
    inputs = 2 * lora_matmuls.PAIRS_PER_LAUNCH
    rows, splits = (shapes["factor_gradients"][place][0] for place in (1, inputs))
    assert splits > 1
    assert rows > splits * lora_matmuls.BLOCK_ROWS * warps
    assert rows % lora_matmuls.BLOCK_ROWS != 0


@pytest.mark.parametrize(("rank", "most"), [(8, 1), (32, 4), (40, 6), (48, 6), (56, 8), (64, 8)])
def test_a_kernel_is_made_for_the_next_number_of_tiles(rank: int, most: int) -> None:
    assert lora_matmuls._kernel_tiles_for_pairs(narrow_pairs((8, 64), (rank, 64))) == most


def test_ranks_of_whole_tiles_up_to_the_largest_have_a_kernel_with_as_many_tiles() -> None:
    ranks = [rank for rank in range(-8, 200) if has_kernel_for_rank(rank)]
    assert ranks == [8, 16, 24, 32, 40, 48, 56, 64]
    assert [tiles_of_smallest_kernel(rank) for rank in ranks] == [1, 2, 3, 4, 6, 6, 8, 8]
    assert tiles_of_smallest_kernel(1) == 1
