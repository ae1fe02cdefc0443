"""A step with a gradient that is not finite changes nothing but the clock; clipping by tier."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx import optimizers

from nested_core import NestedAdamW, Tier
from tests.core.optim import leaves
from tests.core.optim.leaves import bits, counts, step_of

NAMES = ("fast", "slow")
BAD = [mx.nan, mx.inf, -mx.inf]


def values(seed: int, **changes: mx.array) -> dict[str, Any]:
    """Random values of two layers, some of them others."""
    return leaves.values(seed, {name: (6,) for name in NAMES}) | changes


def with_one(value: float) -> mx.array:
    """Ones, but for one element."""
    return mx.array([1.0, 1.0, value, 1.0, 1.0, 1.0])


def two_tiers(frequency: int = 2, **options: Any) -> NestedAdamW:
    """An optimizer that updates `fast` at every step and `slow` at every `frequency`-th."""
    clocks = [Tier(1, frozenset({"fast"})), Tier(frequency)]
    optimizer = NestedAdamW(1e-2, tiers=clocks, **options)
    optimizer.init(values(0))
    return optimizer


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", NAMES)
def test_one_bad_element_skips_the_step_for_every_tier(where, value, compiled) -> None:
    optimizer = two_tiers()
    step = step_of(optimizer, compiled)
    before = step(values(1), values(0))
    moments = bits([optimizer.state[name] for name in NAMES])
    after = step(values(2, **{where: with_one(value)}), before)
    assert bits(after) == bits(before)
    assert bits([optimizer.state[name] for name in NAMES]) == moments
    assert optimizer.step.item() == 2
    assert counts(optimizer) == [(1, 1), (0, 1)]


@pytest.mark.parametrize("mode", ["skip", "accumulate"])
def test_only_accumulate_looks_at_the_gradient_of_a_tier_that_is_not_due(mode: Any) -> None:
    optimizer = two_tiers(slow_gradients=mode)
    optimizer.apply_gradients(values(1, slow=with_one(mx.inf)), values(0))
    assert counts(optimizer)[0] == ((1, 0) if mode == "skip" else (0, 1))


def test_bad_steps_in_a_row_are_counted_until_a_good_one() -> None:
    optimizer = two_tiers()
    in_a_row = []
    for bad in (True, True, False, True, True, True, False):
        gradients = values(1, fast=with_one(mx.nan)) if bad else values(1)
        optimizer.apply_gradients(gradients, values(0))
        in_a_row.append(optimizer.state["nested"]["nonfinite_in_a_row"].item())
    assert in_a_row == [1, 2, 0, 1, 2, 3, 0]


def test_a_schedule_moves_on_over_a_bad_step() -> None:
    optimizer = NestedAdamW(lambda step: 0.1 * (step + 1))
    optimizer.apply_gradients({"w": mx.array([mx.nan])}, {"w": mx.array([1.0])})
    optimizer.apply_gradients({"w": mx.array([1.0])}, {"w": mx.array([1.0])})
    assert optimizer.learning_rate.item() == pytest.approx(0.2)


def test_clipping_with_one_tier_is_mlx_clip_grad_norm_bit_for_bit() -> None:
    optimizer, plain = NestedAdamW(1e-2, max_grad_norm=0.25), optimizers.AdamW(1e-2)
    found = expected = values(0)
    for n in range(1, 21):
        clipped, norm = optimizers.clip_grad_norm(values(n), 0.25)
        found = optimizer.apply_gradients(values(n), found)
        expected = plain.apply_gradients(clipped, expected)
        assert optimizer.state["nested"]["grad_norm"].item() == norm.item()
    assert bits(found) == bits(expected)


def test_gradients_below_the_bound_are_left_as_they_are() -> None:
    bounded, free = two_tiers(max_grad_norm=100.0), two_tiers()
    found = bounded.apply_gradients(values(1), values(0))
    assert bits(found) == bits(free.apply_gradients(values(1), values(0)))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_norm_that_overflows_skips_the_step_where_it_would_clip(compiled: bool) -> None:
    optimizer = two_tiers(max_grad_norm=1.0)
    step = step_of(optimizer, compiled)
    before = step(values(1), values(0))
    after = step(values(2, fast=mx.full((6,), 1e20)), before)
    assert bits(after) == bits(before)
    assert counts(optimizer) == [(1, 1), (0, 1)]
    again = step(values(3), after)
    assert bits(again["fast"]) != bits(after["fast"])
    assert optimizer.state["nested"]["nonfinite_in_a_row"].item() == 0
