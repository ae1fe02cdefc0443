"""Losses and KL divergences of several adapters, against a float64 reference."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_core.data.batches import choose_evaluation_batches, make_batch_arrays
from nested_core.data.dataset_loading import load_run_data
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.measure.losses.prediction_comparison import PredictionComparison, compare_logits
from nested_core.models.parameters import (
    assign_parameters,
    read_parameters,
    reference_trainable_parameters,
)
from nested_core.training.loss import logit_budget
from tests.example import example_config

pytestmark = pytest.mark.slow("computes all logits in float64")

Array = np.ndarray[Any, np.dtype[np.float64]]


def log_softmax(logits: Any) -> Array:
    """In float64."""
    exact = np.asarray(logits, np.float64)
    normalised: Array = exact - np.logaddexp.reduce(exact, axis=-1, keepdims=True)
    return normalised


def exact_divergences(before: Any, after: Any) -> Array:
    """KL(before || after) of each row in float64."""
    log_p, log_q = log_softmax(before), log_softmax(after)
    divergences: Array = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return divergences


def make_logits(seed: int, *, spread: float, move: float, rows: int = 20, vocabulary: int = 400):
    random = np.random.default_rng(seed)
    before = random.normal(0, spread, (rows, vocabulary)).astype(np.float32)
    after = before + random.normal(0, move, before.shape).astype(np.float32)
    return before, after, random.integers(0, vocabulary, rows)


@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0.1, 8),
    move=st.floats(0.001, 3),
    vocabulary=st.sampled_from([2, 400, 20_000]),
)
@settings(max_examples=40, deadline=None)
def test_losses_and_divergences_are_those_of_float64(seed, spread, move, vocabulary) -> None:
    before, after, targets = make_logits(seed, spread=spread, move=move, vocabulary=vocabulary)
    losses, (divergences,) = compare_logits(
        [mx.array(before), mx.array(after)], mx.array(targets.astype(np.int32))
    )
    for logits, own in zip((before, after), losses, strict=True):
        expected = -log_softmax(logits)[np.arange(len(targets)), targets]
        np.testing.assert_allclose(np.array(own), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.array(divergences), exact_divergences(before, after), rtol=1e-4, atol=2e-5
    )
    assert np.array(divergences).min() >= 0


def test_equal_predictions_have_not_moved_and_an_impossible_token_adds_nothing() -> None:
    before, after, targets = make_logits(1, spread=3, move=1, vocabulary=50)
    likeliest = int(before[0].argmax())
    after[:, likeliest] = -math.inf
    tokens = mx.array(targets.astype(np.int32))
    _, divergences = compare_logits([mx.array(a) for a in (after, before, before)], tokens)
    assert np.isfinite(np.array(divergences)).all()
    np.testing.assert_allclose(np.array(divergences[1]), 0, atol=1e-6)
    _, (moved,) = compare_logits([mx.array(before), mx.array(after)], tokens)
    assert np.array(moved)[0] == math.inf


@pytest.mark.parametrize("keeps_head", [True, False])
def test_a_model_compared_in_chunks_gives_the_figures_of_its_whole_logits(
    keeps_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = example_config(num_layers=-1)
    base = LoadedBase.load(config)
    refs = reference_trainable_parameters(base.model)
    split = load_run_data(config)[1]["valid"]
    (batch, *_) = choose_evaluation_batches(split, 4, -1, max_seq_length=64)
    arrays = make_batch_arrays(split, batch, 4)
    key = mx.random.key(0)
    moved = {
        name: value + 0.02 * mx.random.normal(value.shape, key=key)
        for name, value in read_parameters(refs).items()
    }
    values = [read_parameters(refs), moved]
    comparison = PredictionComparison.of_model(base.model, refs)
    assert comparison.head is not None
    if not keeps_head:
        comparison = PredictionComparison(base.model, refs, None)
    vocabulary = base.model.args.vocab_size
    monkeypatch.setattr(logit_budget, "LOGIT_BYTES", 2 * 4 * 4 * vocabulary)  # of two adapters
    monkeypatch.setattr(logit_budget, "MIN_POSITIONS_IN_CACHES", 3)
    compared = comparison.compare(values, arrays)
    tokens, mask = arrays
    logits = []
    for own in values:
        assign_parameters(refs, own)
        logits.append(np.array(base.model(mx.array(tokens[:, :-1])).astype(mx.float32)))
    divergences = exact_divergences(*logits) * mask
    np.testing.assert_allclose(compared.divergences[0], divergences.sum(axis=1), rtol=1e-3)
    assert compared.divergences.min() > 0.01
    for whole, sums in zip(logits, compared.losses, strict=True):
        picked = np.take_along_axis(-log_softmax(whole), tokens[:, 1:, None], axis=-1)[..., 0]
        np.testing.assert_allclose(sums, (picked * mask).sum(axis=1), rtol=1e-4)
    np.testing.assert_array_equal(compared.tokens, mask.sum(axis=1))
