"""KL divergence from what a pass kept, against a float64 reference over the whole vocabulary."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_core.gate import drift
from nested_core.gate.drift import Drift, keep_predictions, kl_divergence, tokens_to_keep


def exact(before, after) -> float:
    """The mean KL divergence in float64."""
    log_p, log_q = (
        rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True)
        for rows in (before.astype(np.float64), after.astype(np.float64))
    )
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


def logits(seed: int, *, spread: float, move: float, rows: int = 20, vocabulary: int = 400):
    random = np.random.default_rng(seed)
    before = random.normal(0, spread, (rows, vocabulary)).astype(np.float32)
    after = before + random.normal(0, move, before.shape).astype(np.float32)
    return before, after


@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0.1, 8),
    move=st.floats(0.01, 3),
    kept=st.integers(1, 400),
)
@settings(max_examples=40, deadline=None)
def test_the_true_value_lies_between_what_is_found_and_its_error(seed, spread, move, kept) -> None:
    before, after = logits(seed, spread=spread, move=move)
    found = kl_divergence(keep_predictions(mx.array(before), kept), mx.array(after))
    true = exact(before, after)
    rounding = 2e-5 + 1e-4 * true
    assert found.mean <= true + rounding
    assert true <= found.mean + found.error + rounding
    if kept == 400:
        assert found.mean == pytest.approx(true, rel=1e-4, abs=2e-5)
        assert found.error == 0


def test_a_large_vocabulary_loses_little_by_what_is_not_kept() -> None:
    before, after = logits(0, spread=4, move=0.5, vocabulary=20_000)
    found = kl_divergence(keep_predictions(mx.array(before), 1024), mx.array(after))
    true = exact(before, after)
    assert found.mean == pytest.approx(true, rel=0.05)
    assert 0 < found.error < 5 * true


def test_equal_predictions_have_not_moved() -> None:
    before, _ = logits(1, spread=3, move=1)
    for kept in (10, 400):
        same = kl_divergence(keep_predictions(mx.array(before), kept), mx.array(before))
        assert same.mean == pytest.approx(0, abs=1e-5)


def test_narrow_logits_and_impossible_tokens_are_taken_as_they_are() -> None:
    before, after = logits(2, spread=2, move=1, vocabulary=50)
    before[:, 7] = after[:, 7] = -math.inf
    for kept in (10, 50):
        narrow = mx.array(before).astype(mx.bfloat16), mx.array(after).astype(mx.bfloat16)
        found = kl_divergence(keep_predictions(narrow[0], kept), narrow[1])
        assert math.isfinite(found.mean)
    after[:, int(before[0].argmax())] = -math.inf
    kept_all = keep_predictions(mx.array(before), 50)
    assert kl_divergence(kept_all, mx.array(after)).mean == math.inf


def test_batches_count_by_their_positions() -> None:
    joined = Drift.join([Drift(1, 3.0, 0.0), Drift(3, 1.0, 0.4)])
    assert (joined.positions, joined.mean) == (4, 1.5)
    assert joined.error == pytest.approx(0.3)
    with pytest.raises(ValueError, match="no prediction"):
        Drift.join([])


@pytest.mark.parametrize(
    ("positions", "vocabulary", "kept"),
    [(4_000, 1_588, 1_588), (4_000, 150_000, 1_024), (100_000, 150_000, 335), (10**7, 50, 50)],
)
def test_what_is_kept_is_bounded(positions, vocabulary, kept) -> None:
    assert tokens_to_keep(positions, vocabulary) == kept
    if kept > drift.FEWEST_TOP_TOKENS:
        assert positions * kept <= drift.MOST_ENTRIES
