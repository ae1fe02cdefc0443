"""What an export may lose to its adapter on held-out rows, whatever the adapter gained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nested_core.measure.fresh_process.starting import Rows
from nested_core.rooms.export.asked import Asked, HeldOutRows, Reading
from nested_core.rooms.export.export_record import KeptGain
from nested_core.rooms.export.judgement import MIN_KEPT_GAIN, judge_reading, measure_kept_gain
from tests.example import example_config
from tests.left_out import needs_rooms

ROUNDING = 0.01


def measure(gain: float, lost: float, rows: int = 200, seed: int = 0) -> KeptGain:
    """The gain kept by an export whose losses are off by rounding a row, and by what it lost."""
    random = np.random.default_rng(seed)
    adapter = random.gamma(4, 0.5, rows)
    base = adapter + gain + random.normal(0, 0.05, rows)
    held_out = HeldOutRows("valid.jsonl", ((1, 2, 3),) * rows, ((1, 2),) * rows, None)
    exported = adapter + lost + random.normal(0, ROUNDING, rows)
    sums = [-2 * losses for losses in (base, adapter, exported)]  # of two tokens each
    return measure_kept_gain(held_out, sums, MIN_KEPT_GAIN)


@pytest.mark.parametrize("gain", [-0.2, 0.0, 0.02, 0.1, 2.0])
@pytest.mark.parametrize("lost", [0.15, 0.5, 3.0])
def test_an_export_that_is_worse_than_its_adapter_is_refused_whatever_the_gain(gain, lost) -> None:
    kept = measure(gain, lost)
    assert kept.is_lost
    assert kept.allowed == pytest.approx(max(0.01, 0.05 * gain), abs=0.01)
    assert (kept.share is not None) == (gain > 0)


@pytest.mark.parametrize(("gain", "rows"), [(0.0, 60), (0.02, 200), (0.02, 12), (0.05, 30)])
def test_a_right_export_is_not_refused_for_a_small_gain_or_few_rows(gain: float, rows: int) -> None:
    refused = [measure(gain, 0.0, rows, seed).is_lost for seed in range(20)]
    assert sum(refused) <= 1


@needs_rooms("preferences")
@pytest.mark.parametrize("loss", ["dpo", "simpo", "orpo"])
def test_the_gain_of_pairs_is_that_of_their_loss_where_both_answers_became_less_likely(
    loss,
) -> None:
    from nested_core.rooms.preferences.training_loss import PreferenceLoss

    of_pairs = PreferenceLoss.of_config(example_config(training={"loss": loss}))
    held_out = HeldOutRows("p", ((1, 2, 3),) * 40, ((1, 2),) * 40, None, of_pairs, "nats/example")
    base = np.full(40, -3.0)
    adapter = np.repeat([-3.1, -23.0], 20)  # the chosen answers, then the rejected ones
    kept = measure_kept_gain(held_out, [base, adapter, adapter], MIN_KEPT_GAIN)
    assert (kept.rows, kept.unit) == (20, "nats/example")
    assert kept.share == pytest.approx(1)
    lost = measure_kept_gain(held_out, [base, adapter, base], MIN_KEPT_GAIN)
    assert lost.is_lost
    assert lost.share == pytest.approx(0)


def test_half_of_a_small_gain_lost_is_refused_with_figures() -> None:
    kept = measure(0.05, 0.025)
    assert kept.is_lost
    assert kept.share == pytest.approx(0.5, abs=0.1)
    assert kept.interval is not None
    assert 0.02 < kept.interval[0] < 0.025 < kept.interval[1] < 0.03


def test_too_few_rows_have_no_interval_and_refuse_a_plain_loss_alone() -> None:
    right, wrong = measure(1.6, 0.0, rows=3), measure(1.6, 1.6, rows=3)
    assert right.interval is None
    assert right.describe_interval() == "too few rows for an interval"
    assert (right.is_lost, wrong.is_lost) == (False, True)
    assert replace(right, exported=float("nan")).is_lost


@pytest.mark.parametrize(
    ("of_base", "of_export", "stands"),
    [(0.04, 0.1, True), (0.18, 0.35, True), (0.3, 0.5, True), (0.3, 0.8, False)],
)
def test_few_bits_may_move_the_logits_further_than_those_of_the_base(
    of_base: float, of_export: float, *, stands: bool
) -> None:
    """Weights that came from few bits are hardly moved by them, and with an adapter they are."""
    random = np.random.default_rng(0)

    def off(logits: Rows, distance: float) -> Rows:
        noise = random.normal(size=logits.shape)
        noise -= noise.mean(axis=-1, keepdims=True)
        size = np.linalg.norm(logits - logits.mean(axis=-1, keepdims=True))
        return logits + distance * size / np.linalg.norm(noise) * noise

    base = random.normal(size=(16, 256))
    adapter = base + random.normal(size=base.shape)
    read = [
        Reading("a test", "digest", None, frozenset({1}), (), logits, np.array([]), {})
        for logits in (base, adapter, off(adapter, of_export), off(base, of_base))
    ]
    findings = judge_reading(
        Asked(Path("base"), None),
        (read[0], read[1], read[2]),
        weights="q4_k_m",
        tokenizer="digest",
        stored_base=read[3],
    )
    assert (not findings.problems) is stands
