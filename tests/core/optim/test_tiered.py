"""Any optimizer of mlx in tiers: its own formula and state, our clock and guarantees around it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx import optimizers
from mlx.utils import tree_flatten

from nested_core import NestedAdamW, Tier, TierStats
from nested_core.config.loading import parse_config
from nested_core.errors import ConfigError, DamagedError
from nested_core.optim.gradients import clip_factor, find_gradient_mark
from nested_core.optim.tier_assignment import TierMap
from nested_core.optim.tiered import Tiered
from nested_core.training.training_setup import build_optimizer
from tests.core.optim import leaves
from tests.core.optim.leaves import OPTIMIZERS, bits, counts, refused, step_of

TIERS = [Tier(1, frozenset({"a"})), Tier(2)]
BAD_STEPS = (3, 6)
by_name = pytest.mark.parametrize("name", OPTIMIZERS)


def values(seed: int) -> dict[str, Any]:
    """Random values of a matrix and a vector."""
    return leaves.values(seed, {"a": (3, 2), "b": (4,)})


def ready(name: str = "sgd", **options: Any) -> Tiered:
    """An optimizer that knows the parameters."""
    optimizer = Tiered(OPTIMIZERS[name], **options)
    optimizer.init(values(0))
    return optimizer


@pytest.mark.parametrize(
    ("name", "compiled"), [("sgd", False), ("muon", False), ("adafactor", False), ("sgd", True)]
)
def test_weights_and_state_are_the_inner_optimizers_own(name: str, compiled: bool) -> None:
    plain, optimizer = OPTIMIZERS[name](), ready(name)
    plain.init(values(0))
    found = expected = values(0)
    ours, theirs = step_of(optimizer, compiled), step_of(plain, compiled)
    for n in range(1, 11):
        found, expected = ours(values(n), found), theirs(values(n), expected)
    assert bits(found) == bits(expected)
    state = bits({key: leaf for key, leaf in optimizer.state.items() if key != "nested"})
    marks = {name for name in state if name.endswith(".had_gradient")}
    assert {key: value for key, value in state.items() if key not in marks} == bits(plain.state)
    assert marks == {"a.had_gradient", "b.had_gradient"}
    assert optimizer.get_tier_stats() == [TierStats(0, 1, 2, 10, 10, 0)]


def matrices(seed: int) -> dict[str, Any]:
    """Random values of two matrices."""
    return leaves.values(seed, {"a": (3, 2), "b": (4, 3)})


def gradients_at(step: int) -> dict[str, Any]:
    """Gradients of a step; at BAD_STEPS one of them is NaN."""
    bad = {"a": mx.full((3, 2), mx.nan)} if step in BAD_STEPS else {}
    return matrices(step) | bad


@by_name
@pytest.mark.parametrize("bound", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["skip", "accumulate"])
def test_a_tier_is_mlx_own_optimizer_on_its_due_steps_alone(mode, bound, name) -> None:
    optimizer = Tiered(OPTIMIZERS[name], TIERS, slow_gradients=mode, max_grad_norm=bound)
    alone = {key: OPTIMIZERS[name]() for key in ("a", "b")}
    found = expected = matrices(0)
    optimizer.init(found)
    chunk: list[mx.array] = []
    for step in range(1, 10):
        gradients = gradients_at(step)
        found = optimizer.apply_gradients(gradients, found)
        if step in BAD_STEPS:
            continue
        chunk = [*chunk, gradients["b"]] if mode == "accumulate" else [gradients["b"]]
        due = {"a": gradients["a"]}
        if step % 2 == 0:
            due["b"] = sum(chunk[1:], chunk[0]) / len(chunk)
            chunk = []
        _, norm = optimizers.clip_grad_norm(due, bound)
        ours = optimizer.state["nested"]["grad_norm"]
        assert ours.item() == pytest.approx(norm.item(), rel=1e-6)
        for key, gradient in due.items():
            clipped = gradient * clip_factor(ours, bound) if bound else gradient
            expected = expected | alone[key].apply_gradients({key: clipped}, {key: expected[key]})
    assert bits(found) == bits(expected)
    for key, plain in alone.items():
        leaf = {part: optimizer.state[key][part] for part in plain.state[key]}
        assert bits(leaf) == bits(plain.state[key])
    assert counts(optimizer) == [(7, 2), (3, 1)]


@pytest.mark.parametrize("make", [OPTIMIZERS["sgd"], lambda: optimizers.Lion(1e-2)])
@pytest.mark.parametrize("mode", ["skip", "accumulate"])
def test_one_compiled_step_is_right_at_every_step(make: Any, mode: Any) -> None:
    ends = []
    for compiled in (False, True):
        optimizer = Tiered(make, TIERS, slow_gradients=mode)
        weights = matrices(0)
        optimizer.init(weights)
        step = step_of(optimizer, compiled)
        for n in range(1, 10):
            weights = step(gradients_at(n), weights)
        ends.append((bits(weights), bits(optimizer.state)))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("cls", [optimizers.Muon, optimizers.SGD, optimizers.Lion])
def test_a_tier_has_its_own_rate_scale_and_weight_decay(cls: Any) -> None:
    slow = Tier(2, learning_rate_scale=0.5, weight_decay=0.3)
    optimizer = Tiered(lambda: cls(1e-2), [TIERS[0], slow])
    plain = cls(mx.array(1e-2) * 0.5, weight_decay=0.3)
    found, expected = matrices(0), {"b": matrices(0)["b"]}
    for step in (1, 2, 3, 4):
        found = optimizer.apply_gradients(matrices(step), found)
        if step % 2 == 0:
            expected = plain.apply_gradients({"b": matrices(step)["b"]}, expected)
    assert bits({"b": found["b"]}) == bits(expected)


def test_a_weight_decay_a_tier_needs_an_optimizer_that_has_one() -> None:
    with refused("A tier has a weight_decay of its own; RMSprop has no weight_decay."):
        Tiered(lambda: optimizers.RMSprop(1e-2), [Tier(weight_decay=0.1)])


def test_a_rate_scale_a_tier_needs_an_optimizer_that_uses_the_learning_rate() -> None:
    scaled = [Tier(learning_rate_scale=0.5)]
    with refused("A tier has a learning_rate_scale, but Adafactor computes its own step size"):
        Tiered(lambda: optimizers.Adafactor(1e-2), scaled)
    Tiered(lambda: optimizers.Adafactor(1e-2, relative_step=False), scaled)


def test_an_adafactor_without_a_learning_rate_is_mlx_own() -> None:
    optimizer, plain = Tiered(optimizers.Adafactor), optimizers.Adafactor()
    found = expected = matrices(0)
    for step in (1, 2, 3):
        found = optimizer.apply_gradients(matrices(step), found)
        expected = plain.apply_gradients(matrices(step), expected)
    assert bits(found) == bits(expected)


@by_name
def test_a_mark_says_whether_an_update_had_a_gradient(name: str) -> None:
    optimizer = Tiered(OPTIMIZERS[name], TIERS)
    weights = matrices(0)
    optimizer.init(weights)
    zero = {"a": mx.zeros((3, 2))}

    def marks() -> list[int]:
        state: dict[str, mx.array] = dict(tree_flatten(optimizer.state))
        arrays = [find_gradient_mark(state, key) for key in ("a", "b")]
        return [array.item() for array in arrays if array is not None]  # type: ignore[misc]

    seen = []
    bad = {"b": mx.full((4, 3), mx.nan)}
    for step, changes in enumerate((zero, zero | bad, zero, zero, {}), start=1):
        weights = optimizer.apply_gradients(matrices(step) | changes, weights)
        seen.append(marks())
    assert seen == [[0, 0], [0, 0], [0, 0], [0, 1], [1, 1]]


def test_adam_says_it_by_its_second_moment() -> None:
    optimizer = NestedAdamW(1e-2)
    optimizer.apply_gradients(matrices(1) | {"a": mx.zeros((3, 2))}, matrices(0))
    state: dict[str, mx.array] = dict(tree_flatten(optimizer.state))
    assert find_gradient_mark(state, "a") is state["a.v"]
    assert not any(name.endswith("had_gradient") for name in state)
    assert find_gradient_mark(state, "unknown") is None


@pytest.mark.parametrize(
    ("cls", "is_elementwise"),
    [(cls, True) for cls in (optimizers.SGD, optimizers.Lion, optimizers.AdamW)]
    + [(optimizers.Muon, False), (optimizers.Adafactor, False)],
)
def test_which_optimizers_are_elementwise(cls: Any, is_elementwise: bool) -> None:
    assert Tiered(lambda: cls(1e-2)).is_elementwise is is_elementwise


@pytest.mark.parametrize("layout", [None, 3])
def test_a_state_of_another_layout_is_refused_in_one_paragraph(layout: int | None) -> None:
    optimizer = NestedAdamW(1e-2, tiers=TIERS)
    optimizer.init(matrices(0))
    state = optimizer.state
    del state["nested"]["layout"]
    if layout is not None:
        state["nested"]["layout"] = mx.array(layout, mx.uint32)
    resumed = NestedAdamW(1e-2, tiers=TIERS)
    resumed.state = state
    with pytest.raises(DamagedError) as caught:
        resumed.init(matrices(0))
    assert str(caught.value) == (
        f"This optimizer state has layout {layout or 1}, of another release; this one reads "
        "layout 2. Continue with the release that wrote it, or start a new run."
    )


@pytest.mark.parametrize(
    ("optimizer", "arguments"), [("adam", {"betas": [0.9]}), ("muon", {"ns_steps": "five"})]
)
def test_arguments_that_mlx_refuses_at_a_step_are_a_configuration_error(
    optimizer: str, arguments: dict[str, Any]
) -> None:
    settings = {"optimizer": optimizer, "optimizer_config": {optimizer: arguments}}
    config = parse_config(settings, source="")
    with pytest.raises(ConfigError, match=r"^optimizer_config or lr_schedule: "):
        build_optimizer(config, TierMap((1,), {"a": 0}), steps=1)
