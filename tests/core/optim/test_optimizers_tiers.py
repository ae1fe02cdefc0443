"""Tiers of frequency 1, 2 and 4: who is updated when, with what, compiled or not."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from nested_core import NestedAdam, NestedAdamW, Tier, backend
from tests.core.optim.leaves import bits, step_of

SHAPES = {"fast": (3, 2), "middle": (4,), "slow": (2, 2, 2)}
FREQUENCIES = {"fast": 1, "middle": 2, "slow": 4}
MODES: list[Literal["skip", "accumulate"]] = ["skip", "accumulate"]
by_mode = pytest.mark.parametrize("mode", MODES)


def tiers(**changes: dict[str, Any]) -> list[Tier]:
    """One tier a layer; `changes` are further arguments of a layer's tier."""
    return [
        Tier(frequency, frozenset({f"{layer}.w"}), **changes.get(layer, {}))
        for layer, frequency in FREQUENCIES.items()
    ]


def tree(seed: int) -> dict[str, Any]:
    """Random values; the same for the same seed."""
    random = np.random.default_rng(seed)
    return {
        layer: {"w": mx.array(random.normal(size=s), mx.float32)} for layer, s in SHAPES.items()
    }


def of(layer: str, values: dict[str, bytes]) -> dict[str, bytes]:
    """The weight, or the moments, of one layer."""
    return {name: value for name, value in values.items() if name.startswith(f"{layer}.")}


def due_only(optimizer: NestedAdam, gradients: dict[str, Any]) -> dict[str, Any]:
    """The gradients of the tiers that are due at the next step."""
    names = frozenset[str]().union(*(optimizer.tiers[i].names or () for i in optimizer.due_tiers()))
    return {layer: g for layer, g in gradients.items() if f"{layer}.w" in names}


def train(optimizer: NestedAdam, steps: int, *, compiled: bool = False) -> tuple[Any, Any]:
    """Weights and state, as bits, after some steps on random gradients."""
    parameters = tree(0)
    optimizer.init(parameters)
    step = step_of(optimizer, compiled)
    for n in range(1, steps + 1):
        parameters = step(tree(n), parameters)
        mx.eval(parameters, optimizer.state)
    return bits(parameters), bits(optimizer.state)


@by_mode
def test_three_steps_with_frequencies_1_and_2_give_3_updates_and_1(mode: Any) -> None:
    names = frozenset({"fast.w"})
    optimizer = NestedAdamW(1e-2, tiers=[Tier(1, names), Tier(2)], slow_gradients=mode)
    train(optimizer, 3)
    fast, slow = optimizer.get_tier_stats()
    assert (fast.tier, fast.frequency, fast.tensors, fast.parameters) == (0, 1, 1, 6)
    assert (slow.tier, slow.frequency, slow.tensors, slow.parameters) == (1, 2, 2, 12)
    assert (fast.updates, fast.skipped, slow.updates, slow.skipped) == (3, 0, 1, 0)


@by_mode
def test_one_step_compiled_by_hand_updates_the_right_tiers_at_every_n(mode: Any) -> None:
    optimizer = NestedAdamW(1e-2, tiers=tiers(), slow_gradients=mode)
    parameters = tree(0)
    optimizer.init(parameters)
    traced = []

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def step(gradients: Any, parameters: Any) -> Any:
        traced.append(1)
        return optimizer.apply_gradients(gradients, parameters)

    for n in range(1, 17):
        updated = step(tree(n), parameters)
        before, after = bits(parameters), bits(updated)
        moved = {name.removesuffix(".w") for name in before if before[name] != after[name]}
        assert moved == {layer for layer, f in FREQUENCIES.items() if n % f == 0}, n
        parameters = updated
    # Without a compiler, MLX on a Linux CPU runs the function itself every time.
    assert len(traced) == (1 if backend.can_compile_kernels() else 16)
    assert [tier.updates for tier in optimizer.get_tier_stats()] == [16, 8, 4]


@by_mode
def test_a_tier_off_its_step_keeps_parameters_and_moments_exactly(mode: Any) -> None:
    optimizer = NestedAdamW(1e-2, tiers=tiers(), slow_gradients=mode)
    parameters = tree(0)
    optimizer.init(parameters)
    for n in range(1, 9):
        kept = bits(parameters), bits(optimizer.state)
        parameters = optimizer.apply_gradients(tree(n), parameters)
        found = bits(parameters), bits(optimizer.state)
        for layer in (layer for layer, f in FREQUENCIES.items() if n % f):
            names = [f"{layer}.w.m", f"{layer}.w.v"]
            assert of(layer, found[0]) == of(layer, kept[0])
            assert [found[1][name] for name in names] == [kept[1][name] for name in names]


@pytest.mark.parametrize("compiled", [False, True])
def test_under_skip_gradients_of_tiers_not_due_do_not_matter(compiled: bool) -> None:
    """Computed, left out or NaN: weights, moments and counts are the same."""

    def with_nan(optimizer: NestedAdam, gradients: Any) -> Any:
        nan = tree_map(lambda g: mx.full(g.shape, mx.nan), gradients)
        return nan | due_only(optimizer, gradients)

    results = []
    for choose in (lambda _, gradients: gradients, due_only, with_nan):
        optimizer = NestedAdamW(1e-2, tiers=tiers(), max_grad_norm=1.0)
        parameters = tree(0)
        optimizer.init(parameters)
        step = step_of(optimizer, compiled)
        for n in range(1, 9):
            parameters = parameters | step(choose(optimizer, tree(n)), parameters)
        results.append((bits(parameters), bits(optimizer.state)))
    assert results[0] == results[1] == results[2]
    assert [tier.updates for tier in optimizer.get_tier_stats()] == [8, 4, 2]


def test_due_tiers_are_those_of_the_next_step_or_of_the_step_asked_for() -> None:
    optimizer = NestedAdamW(1e-2, tiers=tiers())
    assert optimizer.due_tiers() == (0,)
    train(optimizer, 3)
    assert optimizer.due_tiers() == (0, 1, 2)
    due = {n: optimizer.due_tiers(n) for n in (1, 2, 3, 4, 6)}
    assert due == {1: (0,), 2: (0, 1), 3: (0,), 4: (0, 1, 2), 6: (0, 1)}


@by_mode
def test_a_schedule_is_read_on_training_steps_by_every_tier(mode: Any) -> None:
    """The gradient is 1 and beta1 0, so that a tier's first step shows the rate that it had."""

    def schedule(step: mx.array) -> mx.array:
        return 0.1 * (step + 1)

    options: Any = {"betas": (0.0, 0.0), "tiers": tiers(), "slow_gradients": mode}
    optimizer = NestedAdam(schedule, **options)
    parameters = tree_map(mx.zeros_like, tree(0))
    optimizer.init(parameters)
    moved = {}
    for n in range(1, 5):
        updated = optimizer.apply_gradients(tree_map(mx.ones_like, parameters), parameters)
        moved[n] = {each: (updated[each]["w"] - parameters[each]["w"]).max() for each in updated}
        parameters = updated
    steps = {layer: [round(moved[n][layer].item(), 6) for n in moved] for layer in SHAPES}
    assert steps["fast"] == [-0.1, -0.2, -0.3, -0.4]
    assert steps["middle"] == [0.0, -0.2, 0.0, -0.4]
    assert steps["slow"] == [0.0, 0.0, 0.0, -0.4]
