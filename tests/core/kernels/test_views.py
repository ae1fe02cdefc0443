"""Views that are known while a function is traced, and rows that are split by few operations."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from nested_core.kernels.views import MOST_PARTS_OF_A_SPLIT, knowing_views, split_rows, swap_axes


def operations(*arrays: mx.array) -> list[str]:
    """The operations that these arrays are still to be computed by."""
    text: Any = StringIO()
    mx.export_to_dot(text, *arrays)
    return re.findall(r'label ="(\w+)", shape=rectangle', text.getvalue())


def test_axes_that_are_swapped_back_are_the_array_itself_and_its_gradient_is_not_swapped() -> None:
    x = mx.arange(6.0).reshape(2, 3)
    mx.eval(x)

    def loss(stored: mx.array) -> mx.array:
        view = swap_axes(stored, 0, 1)
        again = swap_axes(view, 0, 1)
        assert again is stored
        assert swap_axes(view, -2, -1) is not stored  # other words for the same axes are not known
        return (again * again).sum()

    with knowing_views():
        gradient = mx.grad(loss)(x)
    assert "Transpose" not in operations(gradient)
    assert np.array_equal(np.array(gradient), 2 * np.array(x))


def test_an_array_is_known_by_its_axes_and_within_the_block_alone() -> None:
    x = mx.zeros((2, 3, 4, 5))
    with knowing_views():
        view = swap_axes(x, 1, 2)
        assert swap_axes(view, 1, 2) is x
        assert swap_axes(view, 0, 1).shape == (4, 2, 3, 5)
    assert swap_axes(view, 1, 2) is not x
    assert np.array_equal(np.array(swap_axes(view, 1, 2)), np.array(x))
    with knowing_views():
        assert swap_axes(view, 1, 2) is not x


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 20, 35])
def test_rows_are_split_at_their_counts_by_an_operation_for_ten_parts(count: int) -> None:
    counts = [1 + i % 3 for i in range(count)]
    rows = mx.arange(2 * sum(counts)).reshape(-1, 2)
    mx.eval(rows)
    parts = split_rows(rows, counts)
    names = operations(*parts)
    assert len(names) <= 2 * -(-count // MOST_PARTS_OF_A_SPLIT)
    assert [len(part) for part in parts] == counts
    assert np.array_equal(np.concatenate([np.array(part) for part in parts]), np.array(rows))
