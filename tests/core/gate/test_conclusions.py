"""What losses show: four words, a margin, rare harm, clusters, and who chose what was judged."""

from __future__ import annotations

import json
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.config.sections import GateSection
from nested_core.errors import DamagedError
from nested_core.measure.losses.chosen_candidate import Candidates, read_candidates
from nested_core.measure.losses.loss_figures import HarmedExamples, harm_reasons, summarise_champion
from nested_core.records.loss_conclusion import conclude, count_examples_needed, margin_of_loss
from nested_core.records.losses import read_example_losses
from nested_core.records.paired_difference import compare_pairs, student_t_quantile
from nested_core.records.verdict import ChampionLoss
from nested_core.storage.validation_losses import (
    StepLosses,
    append_step_losses,
    read_step_losses,
    truncate_step_losses,
)
from tests.builders.losses import losses_of, validation_of

# Of compare_pairs at commit 95bc16c: examples, weights, mean, standard error, low and high.
FIGURES = """\
5 plain 0.04623230148537858 0.08830959602716798 -0.14767074967653393 0.29151511770275607
5 weighted -0.027209656974746196 0.0822938453357087 -0.14868831914418562 0.29670167734504277
30 plain 0.005989621090341116 0.03456925767437033 -0.06225811957038733 0.07854973099296396
30 weighted 0.0010709511653281972 0.03531194488038234 -0.06893575047211192 0.07836918981331178
84 plain -0.011704276532458526 0.02287403083095489 -0.05670897874595421 0.033494085135904676
84 weighted -0.013183035315640391 0.025275854579614926 -0.06261887753395273 0.036657308977502516
333 plain -0.0069964172446797136 0.011891976649959005 -0.03015198456534537 0.016969053655784782
333 weighted -0.018623336402012414 0.013649268357640638 -0.04520048753485844 0.008917150403237255
"""
RECORDED = {
    (int(examples), weights == "weighted"): tuple(map(float, figures))
    for examples, weights, *figures in map(str.split, FIGURES.splitlines())
}


@pytest.mark.parametrize(("examples", "is_weighted"), RECORDED)
@pytest.mark.parametrize("numbers_clusters", [False, True])
def test_a_fixed_comparison_of_independent_examples_has_the_figures_of_95bc16c(
    examples: int, is_weighted: bool, numbers_clusters: bool
) -> None:
    random = np.random.default_rng(examples)
    first = random.exponential(2, examples)
    second = first + random.normal(0, 0.2, examples)
    weights = random.integers(1, 60, examples).astype(float)
    clusters = np.arange(examples) if numbers_clusters else None
    found = compare_pairs(first, second, weights if is_weighted else None, clusters)
    figures = (found.mean, found.standard_error, found.low, found.high)
    # NumPy adds up in another order on other processors, which moves the last bit.
    assert figures == pytest.approx(RECORDED[examples, is_weighted], rel=1e-13, abs=0)


@pytest.mark.parametrize(
    ("interval", "high", "word"),
    [
        ((-0.3, -0.1), -0.1, "better"),
        ((-0.1, 0.025), 0.02, "no_worse"),
        ((0.001, 0.019), 0.018, "no_worse"),
        ((0.001, 0.05), 0.04, "worse"),
        ((-0.05, 0.11), 0.09, "inconclusive"),
    ],
)
def test_the_word_follows_from_interval_and_margin(interval, high, word) -> None:
    difference = sum(interval) / 2
    found = conclude(difference, interval, high, margin=0.02, loss_before=1.0, noise="paired")
    assert found == word


@pytest.mark.parametrize(
    ("increase", "before", "noise", "margin"),
    [
        (0.02, 3.0, "paired", 0.06),
        (0.02, 0.01, "paired", 0.01),
        (0.0, 3.0, "paired", 0.0),
        (0.02, 0.01, "none", 0.0002),
    ],
)
def test_the_margin_is_relative_and_at_least_a_hundredth_of_a_nat(
    increase, before, noise, margin
) -> None:
    assert margin_of_loss(increase, before, noise) == pytest.approx(margin)


@pytest.mark.parametrize(
    ("count", "rise", "word"),
    [(4, 0.05, "inconclusive"), (4, 0.11, "worse"), (5, 1.5, "worse"), (30, 0.7, "worse")],
)
def test_small_sets_pass_nothing_that_is_plainly_worse(count, rise, word) -> None:
    noise = np.tile([0.01, -0.01], count)[:count]
    assert validation_of(losses_of(rise + noise - noise.mean())).conclusion == word


def test_an_inconclusive_verdict_says_what_would_settle_it() -> None:
    noise = np.random.default_rng(1).normal(0, 0.2, 26)
    validation = validation_of(losses_of(noise - noise.mean() + 0.03))
    assert validation.conclusion == "inconclusive"
    text = validation.describe_conclusion()
    assert text is not None
    assert text.startswith("inconclusive: +0.03 nats/token (95 % interval -0.0")
    assert text.endswith("allowed rise 0.02); some 510 examples would settle it")
    spread = validation.standard_error * np.sqrt(26)
    assert ((1.645 + 0.8416) * spread / 0.02) ** 2 == pytest.approx(510, rel=0.02)
    assert count_examples_needed(0.0, 50.0, 30, 0.02) is None


@pytest.mark.parametrize(
    ("harmed", "examples", "by", "sd", "beyond"),
    [
        (3, 30, 7.0, 0.05, 1.0),
        (3, 30, 7.0, 0.2, 1.4),
        (3, 10, 5.0, 0.05, 1.0),
        (3, 10, 5.0, 0.2, 2.5),
    ],
)
def test_a_few_examples_that_lose_much_are_refused(harmed, examples, by, sd, beyond) -> None:
    differences = np.random.default_rng(2).normal(0, sd, examples)
    differences[:harmed] = by
    losses = losses_of(differences)
    (reason,) = harm_reasons(losses, validation_of(losses), GateSection())
    assert reason.code == "examples_harmed"
    assert f"{harmed} of {examples} examples lost more than {beyond} nats/token" in reason.message
    assert "valid.jsonl:" in reason.message


def test_harm_is_no_reason_where_as_many_are_helped_or_the_loss_is_better() -> None:
    differences = np.random.default_rng(3).normal(0, 0.05, 40)
    differences[:4] = 3.0
    differences[4:8] = -3.0
    balanced = losses_of(differences)
    assert harm_reasons(balanced, validation_of(balanced), GateSection()) == []
    differences[4:] -= 2.0
    better = losses_of(differences, before=5.0)
    validation = validation_of(better)
    assert (validation.conclusion, validation.harmed) == ("better", 4)
    assert harm_reasons(better, validation, GateSection()) == []


def is_refused(harmed: int, helped: int, examples: int, share: float, by: float = 9.0) -> bool:
    return HarmedExamples(harmed, helped, examples, mean_rise=by).is_beyond_chance(share)


def test_the_share_of_harmed_examples_has_an_exact_bound() -> None:
    assert is_refused(6, 0, 200, 0.01)
    assert not is_refused(5, 0, 200, 0.012)
    assert not is_refused(2, 0, 10, 0.01)
    assert is_refused(9, 1, 100, 0.01)
    assert not is_refused(6, 3, 100, 0.01)


@pytest.mark.parametrize(("harmed", "by", "codes"), [(3, 3.9, 0), (3, 4.1, 1), (4, 1.5, 1)])
def test_three_harmed_examples_are_enough_only_where_they_lost_four_nats(harmed, by, codes) -> None:
    differences = np.random.default_rng(2).normal(0, 0.05, 30)
    differences[:harmed] = by
    losses = losses_of(differences)
    assert len(harm_reasons(losses, validation_of(losses), GateSection())) == codes


@pytest.mark.parametrize(("examples", "share"), [(10, 0.1), (30, 0.05), (60, 0.02), (84, 0.03)])
def test_an_exchange_of_harm_and_help_is_refused_in_few_cases(examples, share) -> None:
    counts = range(examples // 4 + 1)  # nearly all
    chance = sum(
        comb(examples, harmed)
        * comb(examples - harmed, helped)
        * share ** (harmed + helped)
        * (1 - 2 * share) ** (examples - harmed - helped)
        for harmed in counts
        for helped in counts
        if is_refused(harmed, helped, examples, 0.01, by=3.0)
    )
    assert chance < 0.025


def test_copies_of_an_example_are_one_example() -> None:
    eight = np.linspace(-0.22, 0.1, 8)
    place = np.repeat(np.arange(8), 25)
    apart = validation_of(losses_of(eight[place]))
    together = validation_of(losses_of(eight[place], clusters=place))
    assert apart.conclusion == "better"
    assert (together.conclusion, together.clusters, together.examples) == ("no_worse", 8, 200)
    assert together.difference == pytest.approx(apart.difference)
    alone = validation_of(losses_of(eight))
    assert together.standard_error == pytest.approx(alone.standard_error)
    assert any("8 different prompts" in doubt for doubt in together.doubts())


def test_one_instruction_for_all_examples_leaves_the_rows_as_the_draw() -> None:
    differences = np.random.default_rng(5).normal(0, 0.1, 20)
    one = np.zeros(20, np.int64)
    found = validation_of(losses_of(differences, clusters=one))
    assert (found.clusters, found.few_prompts) == (20, 1)
    assert any("have 1 prompt" in doubt for doubt in found.doubts())
    assert validation_of(losses_of(differences[:19], clusters=one[:19])).clusters == 1


@pytest.mark.parametrize(("prompts", "is_enough"), [(4, False), (5, True)])
def test_nothing_is_promoted_by_itself_on_fewer_than_five_prompts(prompts, is_enough) -> None:
    fall = np.linspace(-0.6, -0.4, prompts * 50)
    losses = losses_of(fall, clusters=np.arange(prompts * 50) % prompts)
    validation = validation_of(losses)
    champion = summarise_champion("c4a3", replace(losses, champion=losses.before), GateSection())
    assert (validation.conclusion, champion.conclusion) == ("better", "better")
    for found in (validation, champion):
        assert found.few_prompts == (None if is_enough else prompts)
        assert found.is_better(0.005, "paired") is is_enough
        assert found.is_better(0.005, "none") is is_enough
        assert (found.describe_few_prompts() is None) is is_enough


def test_prompts_that_the_champion_was_trained_on_leave_no_rows_to_promote_by() -> None:
    prompts = np.repeat(np.arange(6), 40)
    losses = losses_of(np.linspace(-0.6, -0.4, 240), clusters=prompts)
    known = np.where(prompts < 2, np.nan, losses.before)
    champion = summarise_champion("c4a3", replace(losses, champion=known), GateSection())
    assert (champion.examples, champion.clusters, champion.interval) == (160, 4, None)
    assert not champion.is_better(0.005, "paired")
    text = str(champion.describe_few_prompts())
    assert "4 different prompts: on fewer than 5 nothing is promoted by itself" in text
    parent = validation_of(losses.leaving_out(prompts < 2))
    assert (parent.examples, parent.clusters, parent.interval) == (160, 4, None)


def test_what_was_trained_on_is_in_no_mean_and_marked_in_the_file(tmp_path: Path) -> None:
    differences = np.full(12, -0.1)
    differences[:4] = 9.0
    losses = losses_of(differences).leaving_out(np.arange(12) < 4)
    validation = validation_of(losses)
    assert (validation.examples, validation.left_out) == (8, 4)
    assert validation.loss_after == pytest.approx(0.9)
    path = tmp_path / "gate-losses.jsonl"
    path.write_bytes(losses.render())
    marks = [json.loads(line).get("left_out") for line in path.read_text().splitlines()]
    assert marks == [True] * 4 + [None] * 8
    assert validation_of(read_example_losses(path)) == validation
    nothing = validation_of(losses_of(differences).leaving_out(np.ones(12, np.bool_)))
    assert (nothing.examples, nothing.loss_after, nothing.conclusion) == (0, None, None)


def test_clusters_are_read_back_from_the_file(tmp_path: Path) -> None:
    losses = losses_of(np.linspace(-0.2, 0.1, 40), clusters=np.arange(40) // 2)
    path = tmp_path / "gate-losses.jsonl"
    path.write_bytes(losses.render())
    assert validation_of(read_example_losses(path)) == validation_of(losses)
    assert '"cluster"' not in losses_of([0.1, 0.2]).render().decode()


def steps_of(examples: int, steps: int, seed: int, drift: float) -> np.ndarray[Any, Any]:
    """Losses of steps whose true loss is 1: each step's are correlated with the one before."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(steps, examples))
    for step in range(1, steps):
        noise[step] = drift * noise[step - 1] + np.sqrt(1 - drift**2) * noise[step]
    return 1 + 0.2 * noise


def quantile_of(steps: np.ndarray[Any, Any]) -> float:
    champion = np.ones(steps.shape[1])
    chosen = steps[steps.mean(axis=1).argmin()]
    judged = losses_of(chosen - 1, champion=champion)
    return Candidates(len(steps), judged.contents, steps).quantile(judged, champion, len(champion))


def test_candidates_are_paired_by_what_the_examples_are_in_any_order_of_the_file() -> None:
    steps = steps_of(200, 24, 0, drift=0.9)
    judged = losses_of(steps[0] - 1, champion=np.ones(200))
    order = np.random.default_rng(1).permutation(200)
    shuffled = losses_of(steps[0][order] - 1, contents=np.arange(1, 201, dtype=np.uint64)[order])
    family = Candidates(24, judged.contents, steps)
    both = [family.quantile(each, np.ones(200), 200) for each in (judged, shuffled)]
    assert both[0] == both[1]


def test_steps_that_differ_little_cost_less_than_steps_of_their_own() -> None:
    independent = student_t_quantile(1 - 0.025 / 24, 199)
    alone = student_t_quantile(0.975, 199)
    near = quantile_of(steps_of(200, 24, 0, drift=0.98))
    far = quantile_of(steps_of(200, 24, 0, drift=0.0))
    assert alone < near < far <= independent
    same = np.repeat(steps_of(200, 1, 0, drift=0.0), 24, axis=0)
    assert quantile_of(same) == pytest.approx(alone, abs=0.12)


@pytest.mark.slow("draws some hundred runs")
def test_the_best_of_equal_steps_is_rarely_promoted() -> None:
    promoted = lucky = told = 0
    for seed in range(150):
        steps = steps_of(30, 24, seed, drift=0.9)
        champion = np.ones(30)
        judged = losses_of(steps[steps.mean(axis=1).argmin()] - 1, champion=champion)
        found = summarise_champion(
            "c", judged, GateSection(), candidates=Candidates(24, judged.contents, steps)
        )
        assert found.interval is not None
        lucky += found.interval[1] < 0
        told += found.conclusion == "better"
        promoted += found.is_better(0.005, "paired")
    assert lucky >= 15
    assert max(told, promoted) <= 9


@pytest.mark.parametrize(
    ("mean", "count", "word"),
    [
        (-0.05, 1, "better"),
        (-0.05, 24, "no_worse"),  # as the best of 24 it may be luck
        (-0.1, 24, "better"),
        (0.0, 24, "inconclusive"),
        (0.1, 24, "worse"),  # worse, although it is the best of 24
    ],
)
def test_the_word_for_the_best_of_several_allows_for_their_number(mean, count, word) -> None:
    drawn = np.random.default_rng(6).normal(0, 0.2, 84)
    judged = losses_of(drawn - drawn.mean() + mean, champion=np.ones(84))
    found = summarise_champion("c", judged, GateSection(), candidates=Candidates(count))
    assert found.conclusion == word
    if word == "inconclusive":
        low, high = found.corrected_interval or (0.0, 0.0)
        assert f"95 % interval {low:+.2g} to {high:+.2g}" in (found.describe_conclusion() or "")


def test_without_the_losses_of_all_candidates_their_number_is_divided_by() -> None:
    judged = losses_of(np.random.default_rng(6).normal(-0.1, 0.2, 84), champion=np.ones(84))
    found = summarise_champion("c", judged, GateSection(), candidates=Candidates(24))
    width = student_t_quantile(1 - 0.025 / 24, 83) * found.standard_error  # type: ignore[operator]
    assert found.corrected_interval == pytest.approx(
        (found.difference - width, found.difference + width)  # type: ignore[operator]
    )
    assert summarise_champion("c", judged, GateSection()).corrected_interval is None


def test_evaluations_are_kept_cut_back_on_resume_and_read_as_candidates(tmp_path: Path) -> None:
    path = tmp_path / "validation-losses.jsonl"
    assert read_candidates(path).count == 1
    for step, loss in ((10, 2.0), (20, 1.0), (30, 0.5), (30, 0.25)):
        append_step_losses(path, StepLosses(step=step, contents=[4, 7], losses=[loss, None]))
    candidates = read_candidates(path)
    assert candidates.count == 3
    assert candidates.losses is not None
    assert candidates.losses[:, 0].tolist() == [2.0, 1.0, 0.25]
    truncate_step_losses(path, 20)
    assert [own.step for own in read_step_losses(path)] == [10, 20]
    path.write_text(path.read_text() + '{"step": 3')
    assert len(read_step_losses(path)) == 2
    path.write_text('{"step": 3}\n')
    with pytest.raises(DamagedError, match="validation-losses"):
        read_step_losses(path)


def test_the_loss_chose_among_the_steps_with_the_fewest_wrong_answers(tmp_path: Path) -> None:
    path = tmp_path / "validation-losses.jsonl"
    for step, wrong in ((10, 0.5), (20, 0.25), (30, 0.5), (40, 0.25)):
        losses = StepLosses(step=step, contents=[4], losses=[float(step)], wrong=wrong)
        append_step_losses(path, losses)
    ties = read_candidates(path, are_ties=True)
    assert ties.losses is not None
    assert (ties.count, ties.losses[:, 0].tolist()) == (2, [20.0, 40.0])
    assert read_candidates(path).count == 4


def test_a_small_or_unsure_gain_is_not_promoted() -> None:
    def is_better(difference: float, *intervals: Any, noise: Any = "paired") -> bool:
        of_all, corrected = intervals
        found = ChampionLoss(
            "c", difference=difference, interval=of_all, corrected_interval=corrected
        )
        return found.is_better(0.005, noise)

    assert is_better(-0.006, (-0.01, -0.001), None)
    assert not is_better(-0.004, (-0.005, -0.003), None)
    assert not is_better(-0.006, (-0.02, 0.001), None)
    assert not is_better(-0.006, (-0.01, -0.001), (-0.02, 0.001))
    assert not is_better(-0.5, None, None)
    assert is_better(-0.006, None, None, noise="none")


def test_under_noise_none_the_bound_is_one_on_the_mean() -> None:
    losses = replace(losses_of([0.5, -0.4, 0.3, -0.3, 0.15, -0.1]))
    assert validation_of(losses, noise="none").conclusion == "worse"
    assert validation_of(losses, noise="none", max_val_loss_increase=0.05).conclusion == "no_worse"
