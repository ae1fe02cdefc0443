"""State: one tree of arrays; from a safetensors file training goes on to the bit."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from nested_core import NestedAdam, NestedAdamW, Tier, TierStats
from nested_core.optim.tiered import Tiered
from tests.core.optim.leaves import OPTIMIZERS, bits

MODES = ["skip", "accumulate"]
CLOCKS = [Tier(1, frozenset({"layers.1.weight", "layers.1.bias"})), Tier(3)]


class Model(nn.Module):
    """Layers with nothing to train before, between and after those with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU()]
        self.empty: dict[str, Any] = {}


def parameters() -> Any:
    """The trainable tree of a model, always the same."""
    return tree_map(lambda leaf: mx.full(leaf.shape, 0.5), Model().trainable_parameters())


def gradients(seed: int) -> Any:
    """Random gradients for it."""
    random = np.random.default_rng(seed)
    return tree_map(lambda p: mx.array(random.normal(size=p.shape), mx.float32), parameters())


def make(mode: Any) -> NestedAdamW:
    """One layer at every step, the other at every third."""
    schedule = optimizers.cosine_decay(1e-2, 20)
    return NestedAdamW(schedule, bias_correction=True, tiers=CLOCKS, slow_gradients=mode)


def train(optimizer: optimizers.Optimizer, weights: Any, steps: range) -> Any:
    for n in steps:
        weights = optimizer.apply_gradients(gradients(n), weights)
    return weights


@pytest.mark.parametrize("with_init", [True, False])
@pytest.mark.parametrize("kind", [*MODES, *OPTIMIZERS])
def test_training_goes_on_from_a_file_bit_for_bit(kind, with_init, tmp_path) -> None:
    straight, stopped, resumed = (
        make(kind) if kind in MODES else Tiered(OPTIMIZERS[kind], CLOCKS) for _ in range(3)
    )
    expected = train(straight, parameters(), range(1, 12))
    weights = train(stopped, parameters(), range(1, 6))
    flat: dict[str, mx.array] = dict(tree_flatten(stopped.state))
    mx.save_safetensors(str(tmp_path / "optimizer.safetensors"), flat)
    loaded: Any = mx.load(str(tmp_path / "optimizer.safetensors"))
    resumed.state = tree_unflatten(list(loaded.items()))
    if with_init:
        resumed.init(parameters())
    assert bits(resumed.state) == bits(stopped.state)
    assert bits(train(resumed, weights, range(6, 12))) == bits(expected)
    assert bits(resumed.state) == bits(straight.state)
    assert resumed.get_tier_stats() == straight.get_tier_stats()


@pytest.mark.parametrize("mode", MODES)
def test_every_moment_is_named_after_its_parameter(mode: str) -> None:
    optimizer = make(mode)
    train(optimizer, parameters(), range(1, 3))
    flat = dict(tree_flatten(optimizer.state))
    assert all(isinstance(leaf, mx.array) for leaf in flat.values())
    for name, parameter in dict(tree_flatten(parameters())).items():
        for moment in ("m", "v"):
            assert flat[f"{name}.{moment}"].shape == parameter.shape
            assert flat[f"{name}.{moment}"].dtype == parameter.dtype


@pytest.mark.parametrize(
    ("ours", "theirs"), [(NestedAdam, optimizers.Adam), (NestedAdamW, optimizers.AdamW)]
)
def test_the_state_of_a_drop_in_is_mlx_own_until_its_first_step(ours: Any, theirs: Any) -> None:
    found, expected = ours(1e-2), theirs(1e-2)
    for optimizer in (found, expected):
        optimizer.init(parameters())
    assert bits(found.state) == bits(expected.state)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(NestedAdam, optimizers.Adam), (NestedAdamW, optimizers.AdamW)]
)
def test_training_that_mlx_began_goes_on_bit_for_bit(ours, theirs, bias_correction) -> None:
    straight = theirs(1e-2, bias_correction=bias_correction)
    begun = train(straight, parameters(), range(1, 8))
    resumed = ours(1e-2, bias_correction=bias_correction)
    resumed.state = tree_map(mx.array, straight.state)
    resumed.init(parameters())
    assert [tier.updates for tier in resumed.get_tier_stats()] == [7]
    expected = train(straight, begun, range(8, 12))
    assert bits(train(resumed, begun, range(8, 12))) == bits(expected)
    moments = {name: leaf for name, leaf in resumed.state.items() if name != "nested"}
    assert bits(moments) == bits(straight.state)
    assert [tier.updates for tier in resumed.get_tier_stats()] == [11]


def test_tiers_count_on_from_the_steps_that_mlx_did() -> None:
    straight = optimizers.AdamW(1e-2)
    begun = train(straight, parameters(), range(1, 8))
    resumed = make("skip")
    resumed.state = tree_map(mx.array, straight.state)
    resumed.init(parameters())
    assert [tier.updates for tier in resumed.get_tier_stats()] == [7, 2]
    train(resumed, begun, range(8, 10))
    assert [tier.updates for tier in resumed.get_tier_stats()] == [9, 3]


def test_tier_stats_are_there_before_the_first_step() -> None:
    optimizer = NestedAdamW(1e-2)
    assert optimizer.get_tier_stats() == [TierStats(0, 1, 0, 0, 0, 0)]
    optimizer.init(parameters())
    assert optimizer.get_tier_stats() == [TierStats(0, 1, 4, 17, 0, 0)]


@pytest.mark.parametrize("mode", MODES)
def test_empty_subtrees_and_lists_with_holes_keep_their_places(mode: str) -> None:
    optimizer = make(mode)
    updated = train(optimizer, parameters(), range(1, 4))
    assert [sorted(layer) for layer in updated["layers"]] == [
        [],
        ["bias", "weight"],
        [],
        ["bias", "weight"],
        [],
    ]
    assert updated["empty"] == {}
    assert not set(bits(updated).items()) & set(bits(parameters()).items())


def test_update_changes_the_weights_of_a_module_with_holes() -> None:
    model = Model()
    optimizer = make("skip")
    optimizer.init(model.trainable_parameters())
    for n in (1, 2, 3):
        before = bits(model.trainable_parameters())
        optimizer.update(model, gradients(n))
        after = bits(model.trainable_parameters())
        moved = {name.split(".")[1] for name in before if before[name] != after[name]}
        assert moved == ({"1", "3"} if n == 3 else {"1"})


def test_a_tree_without_parameters_only_moves_the_clock() -> None:
    optimizer = NestedAdam(1e-2)
    assert optimizer.apply_gradients({}, {}) == {}
    assert optimizer.step.item() == 1


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_weights_and_moments_keep_the_dtype_of_their_parameter(dtype: mx.Dtype) -> None:
    optimizer = NestedAdamW(1e-2, bias_correction=True, max_grad_norm=1.0)
    updated = optimizer.apply_gradients({"w": mx.ones(3, dtype)}, {"w": mx.ones(3, dtype)})
    state = optimizer.state["w"]
    assert [leaf.dtype for leaf in (updated["w"], state["m"], state["v"])] == [dtype] * 3
