"""Differences of paired values: against scipy, and on outcomes that were planted."""

from __future__ import annotations

import math
import time
import tracemalloc
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_core.measure.losses.loss_figures import exchange_mid_p
from nested_core.records import paired_difference
from nested_core.records.loss_conclusion import MIN_EXAMPLES
from nested_core.records.paired_difference import (
    compare_pairs,
    count_resamples,
    smallest_visible_share,
)

SEEDS = 100
QUESTIONS = 200
SCIPYS_RESAMPLES = 20_000
DEVIATIONS = 5.0  # beyond so many standard deviations lie six of ten million


def scores_of(lost: float, won: float, seed: int) -> tuple[list[float], list[float]]:
    """Scores of 200 questions before and after; each is lost or won with the given chance."""
    chances = np.random.default_rng(seed).random(QUESTIONS)
    before = np.where(chances < lost, 1.0, np.where(chances < lost + won, 0.0, 1.0))
    after = np.where(chances < lost, 0.0, 1.0)
    return before.tolist(), after.tolist()


@pytest.fixture(scope="module")
def stats() -> ModuleType:
    """scipy.stats, imported by the worker that needs it: it takes two seconds."""
    return import_module("scipy.stats")


@given(
    seed=st.integers(0, 2**32 - 1),
    examples=st.integers(20, 200),
    skew=st.sampled_from(["normal", "exponential", "lognormal"]),
)
@settings(max_examples=15, deadline=None)
@pytest.mark.slow("imports SciPy")
def test_the_interval_is_scipys_bootstrap_at_the_expanded_level(
    stats, seed, examples, skew
) -> None:
    random = np.random.default_rng(seed)
    first = random.normal(2, 1, examples)
    second = first + getattr(random, skew)(size=examples)
    found = compare_pairs(first, second)
    quantile = stats.t.ppf(0.975, examples - 1) * math.sqrt(examples / (examples - 1))
    tail = stats.norm.sf(quantile)
    expected = stats.bootstrap(
        (second - first,),
        np.mean,
        n_resamples=SCIPYS_RESAMPLES,
        method="percentile",
        batch=2_000,
        rng=np.random.default_rng(seed),
    )
    assert found.mean == pytest.approx(np.mean(second - first))
    # Which share of resamples lies beyond an end is binomial, whatever the values' distribution.
    shares = 1 / count_resamples(examples) + 1 / SCIPYS_RESAMPLES
    rounding = DEVIATIONS * math.sqrt(tail * (1 - tail) * shares)
    means = expected.bootstrap_distribution
    assert np.mean(means < found.low) == pytest.approx(tail, abs=rounding)
    assert np.mean(means > found.high) == pytest.approx(tail, abs=rounding)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=0.1)
    assert found.standard_error == pytest.approx(stats.sem(second - first))


@given(seed=st.integers(0, 2**32 - 1), examples=st.integers(30, 300), shift=st.floats(-0.5, 0.5))
@settings(max_examples=25, deadline=None)
def test_beyond_chance_is_what_scipys_paired_t_test_says(stats, seed, examples, shift) -> None:
    random = np.random.default_rng(seed)
    first = random.normal(2, 1, examples)
    second = first + random.normal(shift, 1, examples)
    chance = stats.ttest_rel(second, first).pvalue
    found = compare_pairs(first, second)
    if chance < 0.03:
        assert found.is_below(0) or found.is_above(0)
    if chance > 0.08:
        assert not found.is_below(0)
        assert not found.is_above(0)


def test_the_t_quantile_is_scipys(stats) -> None:
    degrees = range(MIN_EXAMPLES - 1, 3_000)
    own = [paired_difference._expand_normal_quantile(freedom, 0.95) for freedom in degrees]
    np.testing.assert_allclose(own, stats.t.ppf(0.975, np.array(degrees)), atol=1.5e-3)
    for probability in (0.95, 0.975, 0.999, 0.9999):
        freedoms = [1, 2, 3, 4, 9, 10, 83, 500, 999, 5_000]
        exact = [paired_difference.student_t_quantile(probability, own) for own in freedoms]
        np.testing.assert_allclose(exact, stats.t.ppf(probability, freedoms), rtol=1e-4)


def test_with_weights_it_is_the_difference_of_two_mean_losses_a_token(stats) -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(1, 60, 300).astype(float)
    before = random.exponential(2, 300)
    after = before - random.exponential(0.3, 300)
    found = compare_pairs(before, after, tokens)
    means = np.average(after, weights=tokens) - np.average(before, weights=tokens)
    assert found.mean == pytest.approx(means)

    def mean(drawn_tokens, drawn_losses, axis=-1):
        return (drawn_tokens * drawn_losses).sum(axis) / drawn_tokens.sum(axis)

    expected = stats.bootstrap(
        (tokens, after - before),
        mean,
        paired=True,
        method="percentile",
        n_resamples=4_000,
        rng=np.random.default_rng(1),
    )
    low, high = expected.confidence_interval
    assert found.low == pytest.approx(low, abs=0.06 * (high - low))
    assert found.high == pytest.approx(high, abs=0.06 * (high - low))
    assert found.standard_error == pytest.approx(expected.standard_error, rel=0.08)


def test_an_interval_of_twelve_skewed_losses_is_wider_than_the_plain_percentile_one(stats) -> None:
    second = np.random.default_rng(3).exponential(size=12)
    found = compare_pairs(np.zeros(12), second)
    random = np.random.default_rng(1)
    resampled = stats.bootstrap((second,), np.mean, method="percentile", rng=random)
    plain = resampled.confidence_interval
    assert found.high - found.low > 1.1 * (plain.high - plain.low)
    assert found.smallest_visible == (found.high - found.low) / 2


def test_planted_losses_of_answers_are_seen_and_equal_exchange_is_not(monkeypatch) -> None:
    monkeypatch.setattr(paired_difference, "RESAMPLES", 2_000)
    refused = sum(
        compare_pairs(*scores_of(0.125, 0.025, seed)).is_below(0) for seed in range(SEEDS)
    )
    exchanged = sum(
        compare_pairs(*scores_of(0.05, 0.05, seed)).is_below(0) for seed in range(SEEDS)
    )
    assert refused >= 95
    assert exchanged <= 5


def test_two_adapters_swapped_at_random_by_example_are_rarely_told_apart(monkeypatch) -> None:
    monkeypatch.setattr(paired_difference, "RESAMPLES", 1_000)
    random = np.random.default_rng(7)
    losses = np.stack([random.exponential(2, 84), random.exponential(2, 84)])
    swapped = random.random((1_000, 84)) < 0.5
    improved = sum(
        compare_pairs(
            np.where(swap, losses[1], losses[0]), np.where(swap, losses[0], losses[1])
        ).is_below(0)
        for swap in swapped
    )
    assert improved <= 40


@pytest.mark.parametrize("questions", [5, 12, 30, 84, 200])
def test_the_smallest_visible_share_is_what_the_exact_test_shows(questions) -> None:
    assert smallest_visible_share(questions) == 5 / questions
    assert exchange_mid_p(5, 0) <= 0.025 < exchange_mid_p(4, 0)


def test_the_same_pairs_give_the_same_interval_to_the_bit() -> None:
    values = np.random.default_rng(1).normal(size=(2, 50)).tolist()
    assert compare_pairs(*values) == compare_pairs(*values)


@pytest.mark.parametrize(
    ("first", "second", "weights"),
    [
        ([], [], None),
        ([1.0], [math.nan], None),
        ([math.inf], [math.inf], None),
        ([1.0, 2.0], [1.0, 2.0], [1.0]),
        ([1.0, 2.0], [1.0], None),
        ([1.0, 2.0], [1.0, 2.0], [1.0, 0.0]),
    ],
)
def test_what_cannot_be_compared_is_an_error(first, second, weights) -> None:
    with pytest.raises(ValueError, match="expected as many|must be finite"):
        compare_pairs(first, second, weights)


def test_five_examples_are_enough_for_an_interval_and_four_are_not() -> None:
    before = np.arange(MIN_EXAMPLES, dtype=float)
    enough = compare_pairs(before, before - [0.1, 0.3, 0.2, 0.1, 0.3])
    assert enough.is_measurable
    assert -0.4 < enough.low < enough.mean < enough.high < 0
    few = compare_pairs(before[1:], before[1:] - 0.2)
    assert not (few.is_measurable)
    assert not (few.is_below(0))
    assert few.to_json() == {"difference": few.mean, "standard_error": None, "interval": None}
    assert smallest_visible_share(4) == 1.0
    assert (few.low, few.high) == (-np.inf, np.inf)


@pytest.mark.slow("50,000 examples")
def test_fifty_thousand_examples_take_little_memory_and_time() -> None:
    values = np.random.default_rng(0).normal(size=(2, 50_000))
    tracemalloc.start()
    started = time.process_time()
    found = compare_pairs(values[0], values[1])
    seconds = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20
    assert seconds < 20
    assert found.low < 0.02
