"""Flat updates reach their leaves, or say why not; nothing else in the tree is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from nested_core.errors import UpdateNotApplied
from nested_core.optim.named_updates import apply_flat_updates_to_nested, flatten, verify_updates

Tree = dict[str, Any] | list[Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [{"proj": nn.Linear(2, 3)}, nn.Sequential(nn.Linear(3, 2), nn.ReLU())]
        self.scale = mx.ones((2,))
        self._cache = mx.zeros((1,))
        self.freeze(keys=["scale"], recurse=False)


class Holder(nn.Module):
    """A module whose parameters are any tree."""

    def __init__(self, tree: dict[str, Any]) -> None:
        super().__init__()
        self.tree = tree


def moved(flat: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name: array + 1 for name, array in flat.items()}


def test_flatten_names_the_parameters_of_a_module_as_mlx_does() -> None:
    block = Block()
    assert set(flatten(block)) == {
        "layers.0.proj.weight",
        "layers.0.proj.bias",
        "layers.1.layers.0.weight",
        "layers.1.layers.0.bias",
        "scale",
    }
    assert flatten(block) == dict(tree_flatten(block.parameters()))


def test_flatten_leaves_out_what_is_no_array() -> None:
    assert list(flatten({"a": [None, 3, mx.array(1)], "b": {}})) == ["a.2"]


def test_flatten_refuses_two_leaves_of_one_name() -> None:
    with pytest.raises(ValueError, match=r"two leaves of the tree have one name: a\.b"):
        flatten({"a.b": mx.array(1), "a": {"b": mx.array(2)}})


@pytest.mark.parametrize("make", [Block, lambda: Block().parameters()])
def test_every_update_is_applied_in_place(make: Callable[[], Tree]) -> None:
    tree = make()
    updates = moved(flatten(tree))
    assert apply_flat_updates_to_nested(tree, updates) is tree
    assert all(leaf is updates[name] for name, leaf in flatten(tree).items())


def test_a_frozen_parameter_can_be_set_by_name() -> None:
    block = Block()
    apply_flat_updates_to_nested(block, {"scale": mx.array([3.0, 4.0])})
    assert block.scale.tolist() == [3.0, 4.0]


def test_other_leaves_and_all_containers_stay_the_same_objects(monkeypatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a tree was copied")

    monkeypatch.setattr(copy, "deepcopy", forbidden)
    monkeypatch.setattr(copy, "copy", forbidden)
    inner = [{"w": mx.zeros((2,))}, {"w": mx.ones((2,))}]
    tree: dict[str, Any] = {"layers": inner, "other": mx.zeros((1,))}
    untouched = (inner[0], inner[1], inner[0]["w"], tree["other"])
    apply_flat_updates_to_nested(tree, {"layers.1.w": mx.full((2,), 7.0)})
    assert tree["layers"] is inner
    assert all(
        a is b for a, b in zip(untouched, (*inner, inner[0]["w"], tree["other"]), strict=True)
    )
    assert inner[1]["w"].tolist() == [7.0, 7.0]


def test_a_list_with_holes_takes_updates_beside_the_holes() -> None:
    tree = tree_unflatten([("layers.0.w", mx.zeros((1,))), ("layers.3.w", mx.zeros((1,)))])
    assert tree["layers"][1] == {}
    apply_flat_updates_to_nested(tree, {"layers.3.w": mx.ones((1,))})
    assert tree["layers"][3]["w"].item() == 1.0
    assert tree["layers"][1] == tree["layers"][2] == {}


def test_an_array_beside_a_hole_in_a_list_takes_an_update_that_mlx_refuses() -> None:
    holder, update = (
        Holder({"pair": [mx.zeros((1,)), mx.zeros((1,))]}),
        {"tree.pair.1": mx.ones((1,))},
    )
    with pytest.raises(ValueError, match="Received invalid type: dict"):
        holder.update(tree_unflatten(list(update.items())))
    apply_flat_updates_to_nested(holder, update)
    assert [array.item() for array in holder.tree["pair"]] == [0.0, 1.0]


def test_arrays_directly_in_lists_and_flat_dicts_with_dotted_keys_are_trees_too() -> None:
    tree: list[Any] = [mx.zeros((1,)), [mx.zeros((2,))]]
    apply_flat_updates_to_nested(tree, {"1.0": mx.ones((2,))})
    assert tree[1][0].tolist() == [1.0, 1.0]
    flat = {"layers.0.lora_a": mx.zeros((1,))}
    apply_flat_updates_to_nested(flat, {"layers.0.lora_a": mx.ones((1,))})
    assert flat["layers.0.lora_a"].item() == 1.0


@pytest.mark.parametrize(
    ("name", "update", "message"),
    [
        ("layers.9.w", mx.zeros((2,)), "the tree has no such name; the nearest is layers.0.w"),
        ("layers.0", mx.zeros((2,)), "found dict in the tree, expected an MLX array"),
        ("layers.00.w", mx.zeros((2,)), "the tree has no such name"),
        ("layers.-1.w", mx.zeros((2,)), "the tree has no such name"),
        ("layers." + "9" * 5000 + ".w", mx.zeros((2,)), "the tree has no such name"),
        ("layers.0.w.x", mx.zeros((2,)), "the tree has no such name"),
        ("", mx.zeros((2,)), "the tree has no such name"),
        (
            "layers.0.w",
            mx.zeros((2, 1)),
            "found float32 (2, 1) as the update, expected float32 (2,)",
        ),
        ("layers.0.w", mx.zeros((2,), mx.bfloat16), "found bfloat16 (2,) as the update, expected"),
        ("layers.0.w", [0.0, 0.0], "found list as the update, expected an MLX array"),
        ("pair.0", mx.zeros((2,)), "the tree has no such name"),
    ],
)
def test_an_update_that_does_not_fit_is_named_and_nothing_is_applied(name, update, message) -> None:
    tree = {"layers": [{"w": mx.zeros((2,))}], "v": mx.zeros((1,)), "pair": (mx.zeros((2,)),)}
    with pytest.raises(UpdateNotApplied) as raised:
        apply_flat_updates_to_nested(tree, {"v": mx.ones((1,)), name: update})
    assert f"{name}: {message}" in str(raised.value)
    assert "1 of 2 updates do not fit the tree, so none was applied" in str(raised.value)
    assert flatten({"layers": tree["layers"], "v": tree["v"]})["v"].item() == 0.0


def test_a_private_array_of_a_module_is_not_a_name() -> None:
    with pytest.raises(UpdateNotApplied, match="_cache: the tree has no such name"):
        apply_flat_updates_to_nested(Block(), {"_cache": mx.ones((1,))})


def test_all_problems_are_in_one_message_of_at_most_14_lines() -> None:
    with pytest.raises(UpdateNotApplied) as raised:
        apply_flat_updates_to_nested(
            {"w": mx.zeros((1,))}, {f"x{i}": mx.zeros(1) for i in range(30)}
        )
    lines = str(raised.value).splitlines()
    assert "30 of 30 updates" in lines[0]
    assert lines[-1].strip() == "and 20 more"
    assert len(lines) <= 14


KEYS = st.text("abcxyz", min_size=1, max_size=3)
LEAVES = st.builds(
    lambda shape, value: mx.full(shape, value),
    st.lists(st.integers(1, 3), max_size=2).map(tuple),
    st.floats(-4, 4, width=32),
)
BRANCHES = st.recursive(
    st.dictionaries(KEYS, LEAVES, min_size=1, max_size=3),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3) | st.dictionaries(KEYS, inner | LEAVES, max_size=3)
    ),
    max_leaves=6,
)
TREES = st.dictionaries(KEYS, BRANCHES | LEAVES, min_size=1, max_size=4)


@given(TREES, st.data())
def test_any_subset_of_updates_gives_what_module_update_gives(tree, data) -> None:
    pairs = tree_flatten(tree)
    updates = {
        f"tree.{name}": leaf + 1 for name, leaf in flatten(tree).items() if data.draw(st.booleans())
    }
    ours, theirs = Holder(tree_unflatten(pairs)), Holder(tree_unflatten(pairs))
    apply_flat_updates_to_nested(ours, updates)
    theirs.update(tree_unflatten(list(updates.items())) if updates else {})
    assert list(flatten(ours)) == list(flatten(theirs))
    assert all(leaf is updates.get(name, leaf) for name, leaf in flatten(ours).items())
    assert all(leaf is flatten(theirs)[name] for name, leaf in flatten(ours).items())


@given(TREES)
def test_what_was_applied_verifies_and_what_was_not_does_not(tree: dict[str, Any]) -> None:
    before = flatten(tree)
    expected = moved(before)
    assert verify_updates(before, expected, tree).not_applied == tuple(expected)
    apply_flat_updates_to_nested(tree, expected)
    assert verify_updates(before, expected, tree).not_applied == ()
