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

pytestmark = pytest.mark.slow("hundreds of optimizers")

STEPS = 13
clocks = st.lists(st.integers(1, 6), min_size=1, max_size=8).map(sorted)


def values(tiers: int, seed: int) -> dict[str, mx.array]:
    """A vector a tier; the same for the same seed."""
    return leaves.values(seed, {f"p{i}": (3,) for i in range(tiers)})


def expected(tier: Tier, name: str, tiers: int, mode: str, **options: Any) -> tuple[Any, Any, int]:
    """What mlx's AdamW makes of the gradients that this tier uses, its moments and their number."""
    rate: Any = 1e-2 if tier.learning_rate_scale == 1 else mx.array(1e-2) * tier.learning_rate_scale
    decay = 0.05 if tier.weight_decay is None else tier.weight_decay
    plain = optimizers.AdamW(rate, weight_decay=decay, **options)
    weights, updates, chunk = {name: values(tiers, 0)[name]}, 0, mx.zeros(3)
    for n in range(1, STEPS + 1):
        gradient = values(tiers, n)[name]
        chunk = chunk + gradient
        if n % tier.frequency == 0:
            used = chunk if mode == "sum" else chunk / tier.frequency
            used = gradient if mode == "skip" or tier.frequency == 1 else used
            weights = plain.apply_gradients({name: used}, weights)
            updates, chunk = updates + 1, mx.zeros(3)
    moments = plain.state[name] if updates else {"m": mx.zeros(3), "v": mx.zeros(3)}
    return weights[name], moments, updates


@pytest.mark.parametrize("mode", ["skip", "mean", "sum"])
@pytest.mark.parametrize("compiled", [False, True])
@settings(max_examples=8)
@given(frequencies=clocks)
def test_one_to_eight_tiers_of_any_frequencies_are_an_adamw_each(
    mode: Any, compiled: bool, frequencies: list[int]
) -> None:
    """Few constants are used, for a compiled step has a kernel for each."""
    count = len(frequencies)
    tiers = [
        Tier(every, frozenset({f"p{i}"}), *((1.0, None), (0.3, None), (1.0, 0.2))[i % 3])
        for i, every in enumerate(frequencies)
    ]
    gathers: dict[str, Any] = {} if mode == "skip" else {"slow_gradients": "accumulate"}
    gathers |= {} if mode == "skip" else {"accumulate": mode}
    options: Any = {"bias_correction": mode == "sum"}
    optimizer = NestedAdamW(1e-2, weight_decay=0.05, tiers=tiers, **options, **gathers)
    optimizer.init(values(count, 0))
    step, weights = step_of(optimizer, compiled), values(count, 0)
    for n in range(1, STEPS + 1):
        assert optimizer.due_tiers() == tuple(i for i in range(count) if n % frequencies[i] == 0)
        weights = step(values(count, n), weights)
    answers = [expected(tier, f"p{i}", count, mode, **options) for i, tier in enumerate(tiers)]
    assert [tier.updates for tier in optimizer.get_tier_stats()] == [n for _, _, n in answers]
    assert bits(weights) == bits({f"p{i}": weight for i, (weight, _, _) in enumerate(answers)})
    for i, (_, moments, _) in enumerate(answers):
        found = optimizer.state[f"p{i}"]
        assert bits({part: found[part] for part in moments}) == bits(moments)
