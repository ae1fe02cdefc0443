"""slow_gradients="accumulate": a tier gathers a chunk's gradients and applies them when due."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import pytest
from mlx import optimizers

from nested_core import NestedAdam, NestedAdamW, Tier
from nested_core.optim.tier_assignment import count_expected_updates
from tests.core.optim.leaves import bits, counts, values

RATE = 1e-2
by_combination = pytest.mark.parametrize("combination", ["mean", "sum"])


def accumulating(frequency: int, **options: Any) -> NestedAdamW:
    """An optimizer that updates `fast` at every step and `slow` at every `frequency`-th."""
    clocks = [Tier(1, frozenset({"fast"})), Tier(frequency)]
    return NestedAdamW(RATE, tiers=clocks, slow_gradients="accumulate", **options)


def train(optimizer: NestedAdamW, steps: int, seed: int = 0) -> dict[str, Any]:
    """The weights after some steps on random gradients."""
    parameters = values(seed)
    optimizer.init(parameters)
    for n in range(1, steps + 1):
        parameters = optimizer.apply_gradients(values(seed + n), parameters)
    return parameters


def chunk(steps: range, combination: str, seed: int = 0) -> dict[str, Any]:
    """The mean or the sum of what `slow` was given at these steps."""
    total = sum((values(seed + n)["slow"] for n in steps[1:]), values(seed + steps[0])["slow"])
    return {"slow": total / len(steps) if combination == "mean" else total}


def reference(chunks: list[dict[str, Any]], seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """The weight and state of `slow` after mlx's AdamW was given these gradients, one a step."""
    plain, expected = optimizers.AdamW(RATE, **options), {"slow": values(seed)["slow"]}
    for gradients in chunks:
        expected = plain.apply_gradients(gradients, expected)
    return bits(expected), bits(plain.state)


def test_a_chunk_is_emptied_when_it_is_applied() -> None:
    optimizer = accumulating(3)
    train(optimizer, 2)
    assert optimizer.state["nested"]["gathered"].tolist() == [0, 2]
    expected = values(1)["slow"] + values(2)["slow"]
    assert bits(optimizer.state["slow"]["sum"]) == bits(expected)
    optimizer.apply_gradients(values(3), values(0))
    assert optimizer.state["nested"]["gathered"].tolist() == [0, 0]
    assert mx.all(optimizer.state["slow"]["sum"] == 0).item()


def test_a_tier_of_frequency_1_gathers_nothing() -> None:
    optimizer = accumulating(3)
    train(optimizer, 2)
    assert set(optimizer.state["fast"]) == {"m", "v"}
    assert set(optimizer.state["slow"]) == {"m", "v", "sum"}


def test_every_tier_has_to_bring_its_gradients_at_every_step() -> None:
    optimizer = accumulating(2)
    train(optimizer, 1)
    with pytest.raises(ValueError, match=r"1 gradients are missing, \['slow'\] among them"):
        optimizer.apply_gradients({"fast": values(1)["fast"]}, values(0))


@by_combination
@pytest.mark.parametrize("compiled", [False, True])
def test_flush_applies_an_open_chunk_as_the_gradients_that_came(combination, compiled) -> None:
    optimizer = accumulating(4, accumulate=combination)
    weights = train(optimizer, 6)
    flush = optimizer.flush
    if compiled:
        flush = partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)(flush)
    flushed = flush(weights)
    chunks = [chunk(range(1, 5), combination), chunk(range(5, 7), combination)]
    assert bits({"slow": flushed["slow"]}) == reference(chunks)[0]
    assert bits(flushed["fast"]) == bits(weights["fast"])
    assert optimizer.step.item() == 6
    assert [tier.updates for tier in optimizer.get_tier_stats()] == [6, 2]
    assert optimizer.state["nested"]["gathered"].tolist() == [0, 0]


def test_a_flush_counts_a_chunk_without_a_finite_gradient_as_skipped() -> None:
    optimizer = accumulating(4)
    weights = train(optimizer, 4)
    bad = values(5) | {"slow": mx.full((2, 4), mx.nan)}
    weights = optimizer.apply_gradients(bad, weights)
    assert bits(optimizer.flush(weights)) == bits(weights)
    slow = optimizer.get_tier_stats()[1]
    assert (slow.updates, slow.skipped) == (1, 1)
    assert slow.updates + slow.skipped == count_expected_updates(5, 4, [5])


def test_a_flush_leaves_a_tier_alone_that_was_due_at_the_last_step_and_skipped() -> None:
    optimizer = accumulating(2)
    bad = values(2) | {"slow": mx.full((2, 4), mx.nan)}
    weights = optimizer.apply_gradients(bad, train(optimizer, 1))
    assert bits(optimizer.flush(weights)) == bits(weights)
    slow = optimizer.get_tier_stats()[1]
    assert (slow.updates, slow.skipped) == (0, 1)
    assert slow.updates + slow.skipped == count_expected_updates(2, 2, [2])


def test_flush_of_no_open_chunk_changes_nothing() -> None:
    optimizer = accumulating(4)
    weights = train(optimizer, 4)
    moments = bits(optimizer.state["slow"])
    assert bits(optimizer.flush(weights)) == bits(weights)
    assert bits(optimizer.state["slow"]) == moments
    assert [tier.updates for tier in optimizer.get_tier_stats()] == [4, 1]


def test_flush_under_skip_changes_nothing() -> None:
    optimizer = NestedAdam(RATE, tiers=[Tier(1, frozenset({"fast"})), Tier(4)])
    optimizer.init(values(0))
    weights = optimizer.apply_gradients(values(1), values(0))
    assert bits(optimizer.flush(weights)) == bits(weights)
    assert [tier.updates for tier in optimizer.get_tier_stats()] == [1, 0]


def test_flush_takes_a_tree_that_holds_more_and_leaves_the_rest_alone() -> None:
    optimizer = accumulating(4)
    weights = train(optimizer, 2) | {"frozen": mx.ones((2,))}
    flushed = optimizer.flush(weights)
    assert bits({"slow": flushed["slow"]}) == reference([chunk(range(1, 3), "mean")])[0]
    assert flushed["frozen"] is weights["frozen"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"slow: missing, expected \(\(2, 4\), mlx\.core\.float32\)"),
        ({"slow": mx.ones((8,))}, r"slow: \(\(8,\), mlx\.core\.float32\), expected \(\(2, 4\)"),
        ({"slow": mx.ones((2, 4), mx.bfloat16)}, r"slow: \(\(2, 4\), mlx\.core\.bfloat16\), expec"),
    ],
)
def test_flush_refuses_a_parameter_that_is_not_as_it_was(change: Any, message: str) -> None:
    optimizer = accumulating(4)
    weights = train(optimizer, 2)
    with pytest.raises(ValueError, match=message):
        optimizer.flush({"fast": weights["fast"]} | change)
    assert optimizer.state["nested"]["gathered"].tolist() == [0, 2]


def test_training_goes_on_after_a_flush_on_the_same_clock() -> None:
    optimizer = accumulating(4)
    weights = optimizer.flush(train(optimizer, 2))
    for n in (3, 4):
        weights = optimizer.apply_gradients(values(n), weights)
    chunks = [chunk(range(1, 3), "mean"), chunk(range(3, 5), "mean")]
    assert bits({"slow": weights["slow"]}) == reference(chunks)[0]
    assert [tier.updates for tier in optimizer.get_tier_stats()] == [4, 2]


@by_combination
def test_a_sum_that_would_overflow_skips_the_step_and_keeps_the_chunk(combination: Any) -> None:
    optimizer = accumulating(3, accumulate=combination)
    weights = train(optimizer, 1)
    huge = values(2) | {"slow": mx.full((2, 4), 3.4e38)}
    first = optimizer.apply_gradients(huge, weights)
    second = optimizer.apply_gradients(huge, first)  # finite by itself, not on top of the first
    assert bits(second) == bits(first)
    assert optimizer.state["nested"]["gathered"].tolist() == [0, 2]
    assert mx.isfinite(optimizer.state["slow"]["sum"]).all().item()
    assert counts(optimizer) == [(2, 1), (0, 1)]
