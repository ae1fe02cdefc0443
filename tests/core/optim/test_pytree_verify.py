"""What was written to a tree is read back by name and compared bit for bit."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx.utils import tree_unflatten

from nested_core.errors import UpdateNotApplied
from nested_core.optim.named_updates import apply_flat_updates_to_nested, flatten, verify_updates


def test_verify_tells_applied_from_not_applied_and_moved_from_unmoved() -> None:
    before = {"a": mx.array([1.0, 2.0]), "b": mx.array([3.0]), "c": mx.array([5.0])}
    expected = {"a": before["a"] + 1, "b": before["b"] + 1, "c": before["c"] + 0}
    report = verify_updates(
        before, expected, {"a": before["a"] + 1, "b": before["b"], "c": before["c"]}
    )
    assert report.checked == 3
    assert report.not_applied == ("b",)
    assert report.unmoved == ("b", "c")
    with pytest.raises(UpdateNotApplied, match=r"1 of 3 updates were computed .*: b\."):
        report.require_applied()


def test_verify_passes_where_every_update_is_in_the_module() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    before = flatten(model)
    expected = {name: array + 1 for name, array in before.items()}
    apply_flat_updates_to_nested(model, expected)
    report = verify_updates(before, expected, model)
    assert (report.checked, report.not_applied, report.unmoved) == (4, (), ())
    report.require_applied()


@pytest.mark.parametrize(
    "dtype", [mx.float32, mx.float16, mx.bfloat16, mx.complex64, mx.int8, mx.bool_]
)
def test_verify_compares_bits_in_every_dtype(dtype: mx.Dtype) -> None:
    old, new = mx.array([0, 1]).astype(dtype), mx.array([1, 1]).astype(dtype)
    copy_of_new = mx.array([1, 1]).astype(dtype)
    assert verify_updates({"w": old}, {"w": new}, {"w": copy_of_new}).not_applied == ()
    assert verify_updates({"w": old}, {"w": new}, {"w": copy_of_new}).unmoved == ()
    assert verify_updates({"w": copy_of_new}, {"w": old}, {"w": new}).unmoved == ("w",)


def test_nan_equals_itself_and_the_two_zeros_differ() -> None:
    nan, zero, minus_zero = mx.array([float("nan")]), mx.array([0.0]), mx.array([-0.0])
    again = mx.array([float("nan")])
    assert verify_updates({"w": zero}, {"w": nan}, {"w": again}).not_applied == ()
    assert verify_updates({"w": nan}, {"w": again}, {"w": again}).unmoved == ("w",)
    assert verify_updates({"w": zero}, {"w": minus_zero}, {"w": zero}).not_applied == ("w",)


@pytest.mark.parametrize(
    "nested", [{}, {"w": mx.zeros((2,))}, {"w": mx.zeros((1,), mx.float16)}, {"w": [1.0]}]
)
def test_a_leaf_that_is_missing_or_of_another_kind_is_not_applied(nested: dict[str, Any]) -> None:
    report = verify_updates({"w": mx.ones((1,))}, {"w": mx.zeros((1,))}, nested)
    assert (report.not_applied, report.unmoved) == (("w",), ())


def test_verify_needs_a_value_from_before_for_every_name() -> None:
    with pytest.raises(ValueError, match="no value before the update is known for: w"):
        verify_updates({}, {"w": mx.zeros((1,))}, {"w": mx.zeros((1,))})


def test_many_tensors_take_one_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {f"layers.{i}.w": mx.full((4, 8), float(i)) for i in range(450)}
    tree = tree_unflatten([(name, array + 1) for name, array in before.items()])
    expected = {name: array + 1 for name, array in before.items()}
    stacked: list[int] = []
    original = mx.stack

    def counting(arrays: list[mx.array]) -> mx.array:
        stacked.append(len(arrays))
        return original(arrays)

    monkeypatch.setattr(mx, "stack", counting)
    assert verify_updates(before, expected, tree).not_applied == ()
    assert stacked == [900]
