"""Any number of tiers, any frequencies, any owners: each tier is an AdamW of its own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import optimizers

from nested_core import NestedAdamW, Tier
from tests.core.optim import leaves
from tests.core.optim.leaves import bits, step_of

STEPS = 13
clocks = st.lists(st.integers(1, 6), min_size=1, max_size=8).map(sorted)


def values(tiers: int, seed: int) -> dict[str, mx.array]:
    """A vector a tier; the same for the same seed."""
    return leaves.values(seed, {f"p{i}": (3,) for i in range(tiers)})


def expected(frequency: int, name: str, tiers: int, mode: str) -> tuple[mx.array, int]:
    """What mlx's AdamW makes of the gradients that this tier uses, and their number."""
    plain, weights = optimizers.AdamW(1e-2), {name: values(tiers, 0)[name]}
    updates, chunk = 0, mx.zeros(3)
    for n in range(1, STEPS + 1):
        gradient = values(tiers, n)[name]
        chunk = chunk + gradient
        if n % frequency == 0:
            used = chunk / frequency if mode == "accumulate" and frequency > 1 else gradient
            weights = plain.apply_gradients({name: used}, weights)
            updates, chunk = updates + 1, mx.zeros(3)
    return weights[name], updates


@pytest.mark.parametrize("mode", ["skip", "accumulate"])
@pytest.mark.parametrize("compiled", [False, True])
@settings(max_examples=8)
@given(frequencies=clocks)
def test_one_to_eight_tiers_of_any_frequencies_are_an_adamw_each(
    mode: Any, compiled: bool, frequencies: list[int]
) -> None:
    count = len(frequencies)
    tiers = [Tier(every, frozenset({f"p{i}"})) for i, every in enumerate(frequencies)]
    optimizer = NestedAdamW(1e-2, tiers=tiers, slow_gradients=mode)
    optimizer.init(values(count, 0))
    step, weights = step_of(optimizer, compiled), values(count, 0)
    for n in range(1, STEPS + 1):
        assert optimizer.due_tiers() == tuple(i for i in range(count) if n % frequencies[i] == 0)
        weights = step(values(count, n), weights)
    answers = [expected(frequencies[i], f"p{i}", count, mode) for i in range(count)]
    assert [tier.updates for tier in optimizer.get_tier_stats()] == [n for _, n in answers]
    assert bits(weights) == bits({f"p{i}": weight for i, (weight, _) in enumerate(answers)})
