"""Suites whose answers are lost and won as planted: which of them the gate refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.planted_suites import Exchange, PlantedSuite
from nested_core.measure.losses.loss_figures import exchange_mid_p
from nested_core.records import paired_difference

LOSING = Exchange(lost=0.125, won=0.025)
EQUAL = Exchange(lost=0.05, won=0.05)
HUNDRED = range(100)


def count_refused(suite: PlantedSuite, exchange: Exchange, seeds: range) -> int:
    return sum(suite.judge(exchange, seed).is_refused for seed in seeds)


@pytest.mark.reliability
def test_a_loss_of_ten_points_is_refused_and_an_equal_exchange_is_not(tmp_path, capsys) -> None:
    suite = PlantedSuite(tmp_path)
    losing, equal = (count_refused(suite, exchange, HUNDRED) for exchange in (LOSING, EQUAL))
    with capsys.disabled():
        print(f"\nrefused of 100: {losing} at 12.5 % lost, 2.5 % won; {equal} at 5 % each")
    assert losing >= 95
    assert equal <= 5


def test_a_few_planted_suites_are_judged_alike(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(paired_difference, "RESAMPLES", 1_000)
    suite = PlantedSuite(tmp_path)
    assert count_refused(suite, LOSING, range(10)) >= 9
    assert count_refused(suite, EQUAL, range(10)) <= 1


@pytest.mark.slow("draws many suites")
def test_what_a_champion_answered_is_held_as_strictly_beside_a_base_that_answered_nothing(
    tmp_path: Path,
) -> None:
    """Nothing can be lost of the base, so that it takes nothing of the level of 2.5 %."""
    suite = PlantedSuite(tmp_path)
    refused = set()
    for seed in range(6):
        for exchange in (LOSING, EQUAL):
            alone = suite.judge(exchange, seed)
            beside_base = suite.judge(exchange, seed, before="champion")
            chance = exchange_mid_p(alone.lost, alone.won)
            assert (beside_base.lost, beside_base.won) == (alone.lost, alone.won)
            assert beside_base.is_refused == alone.is_refused == (chance <= 0.025)
            refused.add(alone.is_refused)
    assert refused == {True, False}


def test_a_drop_within_max_drop_is_let_pass_and_without_noise_every_drop_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paired_difference, "RESAMPLES", 1_000)
    lenient = PlantedSuite(tmp_path, max_drop=0.2)
    assert count_refused(lenient, LOSING, range(3)) == 0
    strict = PlantedSuite(tmp_path, noise="none")
    verdicts = [strict.judge(EQUAL, seed) for seed in range(6)]
    dropped = [verdict.lost > verdict.won for verdict in verdicts]
    assert [verdict.is_refused for verdict in verdicts] == dropped
    assert 0 < sum(dropped) < 6
