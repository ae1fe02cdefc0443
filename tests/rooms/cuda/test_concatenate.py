"""Arrays one after the other in a vector, at once or in groups."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from nested_core import backend
from nested_core.kernels.device_operations import concatenate_in_mlx
from nested_core.rooms.cuda import concatenate


def arrays_of(*shapes: tuple[int, ...], dtype: mx.Dtype = mx.bfloat16) -> list[mx.array]:
    keys = mx.random.split(mx.random.key(0), len(shapes))
    return [mx.random.normal(s, key=k).astype(dtype) for s, k in zip(shapes, keys, strict=True)]


def is_same(found: mx.array, arrays: Sequence[mx.array]) -> bool:
    expected = np.concatenate([np.array(a.astype(mx.float32)).reshape(-1) for a in arrays])
    return found.dtype == arrays[0].dtype and np.array_equal(
        np.array(found.astype(mx.float32)), expected
    )


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine whose kernel agrees, MLX in its place; how many arrays each launch was given."""
    counts: list[int] = []

    def join(arrays: Sequence[mx.array]) -> mx.array:
        assert all(array.nbytes % concatenate.LOAD_BYTES == 0 for array in arrays)
        counts.append(len(arrays))
        return concatenate_in_mlx(arrays)

    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    monkeypatch.setattr(concatenate.concatenate_on_cuda, "agrees_with_reference", lambda: True)
    monkeypatch.setattr(concatenate.concatenate_on_cuda, "launch", join)
    return counts


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_elements_follow_one_another_row_by_row_in_the_arrays_order(dtype: mx.Dtype) -> None:
    arrays = arrays_of((3, 5), (7,), (2, 3, 4), (1, 1), dtype=dtype)
    arrays[0] = arrays[0].T
    found = concatenate.concatenate_flattened(arrays)
    assert found.shape == (15 + 7 + 24 + 1,)
    assert is_same(found, arrays)


def test_one_array_is_its_elements_in_a_row(kernel_calls: list[int]) -> None:
    (array,) = arrays_of((8, 16))
    assert is_same(concatenate.concatenate_flattened([array.T]), [array.T])
    assert kernel_calls == []


@pytest.mark.parametrize(
    ("dtype", "odd", "fits"),
    [
        (mx.bfloat16, 8, True),
        (mx.bfloat16, 12, False),
        (mx.float32, 12, True),
        (mx.float32, 6, False),
    ],
)
def test_the_kernel_takes_arrays_of_whole_loads(dtype, odd, fits, kernel_calls) -> None:
    arrays = arrays_of((16, 8), (odd,), (24,), dtype=dtype)
    assert is_same(concatenate.concatenate_flattened(arrays), arrays)
    assert kernel_calls == ([3] if fits else [])


def test_arrays_of_several_dtypes_go_to_mlx(kernel_calls: list[int]) -> None:
    arrays = arrays_of((16,)) + arrays_of((8,), dtype=mx.float32)
    found = concatenate.concatenate_flattened(arrays)
    assert (found.dtype, found.shape, kernel_calls) == (mx.float32, (24,), [])


@pytest.mark.parametrize(
    ("count", "launches"),
    [
        (2, [2]),
        (concatenate.ARRAYS_PER_LAUNCH, [32]),
        (concatenate.ARRAYS_PER_LAUNCH + 1, [32, 1, 2]),
        (70, [32, 32, 6, 3]),
        (1025, [32] * 32 + [1] + [32, 1] + [2]),
    ],
)
def test_more_arrays_than_a_launch_takes_are_joined_in_groups(
    count: int, launches: list[int], kernel_calls: list[int]
) -> None:
    arrays = arrays_of(*[(8 + 8 * (i % 3),) for i in range(count)])
    assert is_same(concatenate.concatenate_flattened(arrays), arrays)
    assert kernel_calls == launches
