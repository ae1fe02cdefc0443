"""A tier's tensors in one vector: the same values and moments, by name, as tensor by tensor."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.optimizers import SGD, Muon

from nested_core.optim.gradients import Flat, optimizer_state_by_parameter
from nested_core.optim.named_updates import flatten
from nested_core.optim.tier_assignment import TierMap
from nested_core.optim.tier_counters import COUNTERS_KEY, Tier
from nested_core.optim.tiered import NestedAdamW, Tiered
from nested_core.training.parameter_packing import (
    PackedArray,
    Packing,
    make_packing,
    unflatten_names,
)

SHAPES = {
    "layers.0.a": (8, 3),
    "layers.0.b": (3, 5),
    "layers.1.a": (8, 3),
    "layers.1.b": (2, 3, 4),
    "layers.2.a": (7,),
}
TIERS = TierMap(
    (1, 2, 3), {"layers.0.a": 0, "layers.0.b": 0, "layers.1.a": 1, "layers.1.b": 1, "layers.2.a": 2}
)


def random_values(seed: int) -> Flat:
    mx.random.seed(seed)
    return {name: mx.random.normal(shape) for name, shape in SHAPES.items()}


def make(slow_gradients: str, values: Flat) -> NestedAdamW:
    optimizer = NestedAdamW(
        lambda step: 1e-2 / (step + 1),
        tiers=[
            Tier(f, TIERS.names(i), 1.0 + i, weight_decay=0.1 * i)
            for i, f in enumerate(TIERS.frequencies)
        ],
        slow_gradients=slow_gradients,
        bias_correction=True,
    )
    optimizer.init(unflatten_names(values))
    return optimizer


def bits(tree: Any) -> dict[str, bytes]:
    return {name: np.array(value).tobytes() for name, value in flatten(tree).items()}


def apply(optimizer: Any, gradients: Flat, values: Flat) -> Flat:
    return flatten(optimizer.apply_gradients(unflatten_names(gradients), unflatten_names(values)))


@pytest.mark.parametrize("slow_gradients", ["skip", "accumulate"])
def test_packed_steps_give_every_weight_and_moment_of_steps_tensor_by_tensor(
    slow_gradients: str,
) -> None:
    plain_values = values = random_values(0)
    plain, optimizer = make(slow_gradients, values), make(slow_gradients, values)
    packing = Packing(values, TIERS, by_tier=True)
    assert list(packing.arrays) == ["tier0", "tier1", "tier2"]
    packed, packed_optimizer = packing.pack(values), packing.pack_optimizer(optimizer, values)
    for step in range(1, 8):
        gradients = random_values(step)
        plain_values = apply(plain, gradients, plain_values)
        packed = apply(packed_optimizer, packing.pack(gradients), packed)
        packing.copy_step_and_learning_rate(packed_optimizer, optimizer)
        values = packing.unpack(packed)
        packing.unpack_optimizer(
            packed_optimizer, optimizer_state_by_parameter(unflatten_names(values), optimizer.state)
        )
        assert bits(values) == bits(plain_values)
        ours, theirs = bits(optimizer.state), bits(plain.state)
        for state in (ours, theirs):
            del state[f"{COUNTERS_KEY}.grad_norm"]  # a sum's own order
        assert ours == theirs


def test_an_optimizer_packed_in_the_middle_goes_on_as_it_would_have() -> None:
    values = random_values(0)
    straight, stopped = make("skip", values), make("skip", values)
    for step in range(1, 4):
        gradients = random_values(step)
        apply(straight, gradients, values)
        apply(stopped, gradients, values)
    packing = Packing(values, TIERS, by_tier=True)
    packed_optimizer = packing.pack_optimizer(stopped, values)
    gradients = random_values(4)
    expected = apply(straight, gradients, values)
    assert bits(
        packing.unpack(apply(packed_optimizer, packing.pack(gradients), packing.pack(values)))
    ) == bits(expected)


def test_a_packed_sgd_keeps_a_mark_of_a_gradient_for_each_tensor() -> None:
    values = random_values(0)
    clocks = [Tier(f, TIERS.names(i)) for i, f in enumerate(TIERS.frequencies)]
    plain, optimizer = (Tiered(lambda: SGD(0.1, momentum=0.9), clocks) for _ in range(2))
    plain.init(unflatten_names(values))
    optimizer.init(unflatten_names(values))
    packing = make_packing(values, TIERS, optimizer, pack_by_tier=True)
    packed, packed_optimizer = packing.pack(values), packing.pack_optimizer(optimizer, values)
    for step in range(1, 4):
        gradients = random_values(step) | {"layers.0.a": mx.zeros((8, 3))}
        values = apply(plain, gradients, values)
        packed = apply(packed_optimizer, packing.pack(gradients), packed)
    packing.copy_step_and_learning_rate(packed_optimizer, optimizer)
    packing.unpack_optimizer(
        packed_optimizer, optimizer_state_by_parameter(unflatten_names(values), optimizer.state)
    )
    assert bits(packing.unpack(packed)) == bits(values)
    ours, theirs = bits(optimizer.state), bits(plain.state)
    del ours[f"{COUNTERS_KEY}.grad_norm"], theirs[f"{COUNTERS_KEY}.grad_norm"]  # a sum's own order
    assert ours == theirs
    marks = {name: optimizer.state["layers"][0][name]["had_gradient"].item() for name in "ab"}
    assert marks == {"a": 0, "b": 1}


SIDES = {"tall": (48, 8), "wide": (8, 40), "square": (8, 8), "vector": (24,), "deep": (9, 3, 4)}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("names", [list(SIDES), list(SIDES)[::-1], ["tall"], ["wide", "tall"]])
def test_what_is_cut_is_what_was_joined_to_the_bit(names: list[str], dtype: mx.Dtype) -> None:
    mx.random.seed(0)
    values = {name: mx.random.normal(SIDES[name]).astype(dtype) for name in names}
    array = PackedArray(0, {name: SIDES[name] for name in names})
    joined = array.pack({name: values[name] for name in SIDES if name in values})
    found = array.unpack(joined)
    assert list(found) == names
    assert joined.size == sum(value.size for value in values.values())
    for name, value in values.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == joined.dtype == dtype
        assert np.array_equal(bits_of(found[name]), bits_of(value))


def bits_of(array: mx.array) -> Any:
    kind = mx.uint32 if array.dtype == mx.float32 else mx.uint16
    return np.array(mx.contiguous(array).view(kind))


def test_a_tall_matrix_lies_in_the_vector_with_its_short_side_first() -> None:
    values = random_values(0)
    array = PackedArray(0, {name: SHAPES[name] for name in ("layers.0.a", "layers.0.b")})
    vector = np.array(array.pack(values))
    lora_a, lora_b = np.array(values["layers.0.a"]), np.array(values["layers.0.b"])
    assert vector[:24].tolist() == lora_a.T.reshape(-1).tolist()
    assert vector[24:].tolist() == lora_b.reshape(-1).tolist()
    transposed = np.array(array.unpack(mx.array(vector))["layers.0.a"].T, copy=False)
    assert transposed.shape == (3, 8)
    assert transposed.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize(("odd", "views"), [(7, False), (16, True)])
def test_what_is_cut_begins_where_16_bytes_can_be_loaded(odd: int, views: bool) -> None:
    array = PackedArray(0, {"first": (odd,), "second": (2, 8), "third": (24,)})
    vector = mx.random.normal((odd + 40,)).astype(mx.float16)
    mx.eval(vector)
    start = address(vector)
    starts = [address(each.reshape(-1)) for each in array.unpack(vector).values()]
    assert {place % 16 for place in starts} == {start % 16}
    assert all(start <= place < start + vector.nbytes for place in starts) is views


def address(array: mx.array) -> int:
    place: int = np.array(array, copy=False).ctypes.data
    return place


def test_a_tensor_that_is_kept_alone_stays_as_it_is() -> None:
    array, value = PackedArray(0, {"a": (8, 3)}), mx.ones((8, 3))
    assert array.pack({"a": value}) is value
    assert array.unpack(value)["a"] is value


def test_a_tier_left_out_of_an_update_keeps_its_array() -> None:
    values = random_values(0)
    packing = Packing(values, TIERS, by_tier=True)
    packed_optimizer = packing.pack_optimizer(make("skip", values), values)
    given = {key: packing.pack(values)[key] for key in packing.keys_of_tiers((0,))}
    assert apply(packed_optimizer, given, packing.pack(values)).keys() == {"tier0"}


@pytest.mark.parametrize("small", [True, False])
def test_only_an_elementwise_optimizer_of_small_tensors_is_packed(small: bool) -> None:
    values = random_values(0)
    assert make_packing(values, TIERS, make("skip", values), pack_by_tier=small).by_tier is small
    other = Tiered(lambda: Muon(0.1))
    assert make_packing(values, TIERS, other, pack_by_tier=small).by_tier is False


def test_unpacked_tensors_stay_the_arrays_they_are() -> None:
    values = random_values(0)
    packing = Packing(values, TIERS, by_tier=False)
    optimizer = make("skip", values)
    assert packing.pack_optimizer(optimizer, values) is optimizer
    assert all(packing.unpack(packing.pack(values))[name] is values[name] for name in values)
    assert packing.keys_of_tiers((1, 2)) == {"layers.1.a", "layers.1.b", "layers.2.a"}


@pytest.mark.parametrize("by_tier", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_tensors_that_a_step_left_as_they_were_are_found_by_their_bits(dtype, by_tier) -> None:
    before = {name: value.astype(dtype) for name, value in random_values(5).items()}
    before["layers.0.a"] = mx.full((8, 3), float("nan"), dtype)
    before["layers.1.a"] = mx.zeros((8, 3), dtype)
    packing = Packing(before, TIERS, by_tier=by_tier)
    after = dict(before)
    assert packing.find_unmoved(packing.pack(before), packing.pack(after)) == list(
        packing.unpack(packing.pack(before))
    )
    after["layers.0.b"] = before["layers.0.b"] * mx.array([[1], [1], [-1]], dtype)  # its last row
    after["layers.1.a"] = -before["layers.1.a"]  # -0.0
    after["layers.1.b"] = mx.array(before["layers.1.b"])
    after["layers.1.b"][0, 0, 0] += 1  # the first element beside the last of another tensor
    unmoved = packing.find_unmoved(packing.pack(before), packing.pack(after))
    assert sorted(unmoved) == ["layers.0.a", "layers.2.a"]


def test_of_a_step_without_some_tiers_the_others_alone_are_looked_at() -> None:
    before = random_values(6)
    packing = Packing(before, TIERS, by_tier=True)
    packed = packing.pack(before)
    updates = {"tier1": packed["tier1"] + mx.zeros_like(packed["tier1"])}
    old = {"tier1": packed["tier1"]}
    assert packing.find_unmoved(old, updates) == ["layers.1.a", "layers.1.b"]
    assert packing.find_unmoved({}, {}) == []
