"""The study of time to a loss: its arithmetic, its data, what is missing in a file, its report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from mlx_lm.tuner.trainer import iterate_batches

from benchmarks.time_to_loss.arms import ARMS, Arm, arm_of
from benchmarks.time_to_loss.corpus import (
    ENTITIES,
    PROMPT_LENGTH,
    TOKEN,
    VALUES,
    VOCABULARY,
    WIDTH,
    Corpus,
    training_order,
    value_positions,
)
from benchmarks.time_to_loss.curves import crossing, elapsed, middle, to_target
from benchmarks.time_to_loss.models import text_batch
from benchmarks.time_to_loss.report import write_report
from benchmarks.time_to_loss.rows import TUNING_SEED, Run, Study, chosen_rate, missing

STUDY = Study(["3M"], ["mlx_lm", "ours"], 2, [1e-3, 2e-3], {"3M": 32})


def row(
    arm: str, seed: int, rate: float, losses: Sequence[float | None], second: float
) -> dict[str, Any]:
    """A run of windows of 16 steps that take a number of seconds each, the first ten times it."""
    windows = [10 * second, *[second] * (len(losses) - 2)]
    steps = [16 * n for n in range(len(losses))]
    named = {"size": "3M", "arm": arm, "seed": seed, "rate": rate, "steps": steps}
    return named | {"losses": losses, "windows": windows, "right": [0.5] * len(losses)}


def whole_study() -> list[dict[str, Any]]:
    """The rival ends at 1.0 after 32 steps and 4 s; ours gets there after 24 steps and 1.5 s."""
    slow, fast = [9.0, 2.0, 1.0], [9.0, 1.5, 0.5]
    grid = [row("mlx_lm", 0, 1e-3, slow, 2.0), row("mlx_lm", 0, 2e-3, [9.0, None, None], 2.0)]
    grid += [row("ours", 0, 1e-3, [9.0, 8.0, 7.0], 1.0), row("ours", 0, 2e-3, fast, 1.0)]
    seeds = [row("mlx_lm", seed, 1e-3, slow, 2.0) for seed in (1, 2)]
    return grid + seeds + [row("ours", seed, 2e-3, [*fast, 0.4], 1.0) for seed in (1, 2)]


def test_a_crossing_lies_on_the_line_between_the_two_looks_around_it():
    assert crossing([0, 16, 32], [4.0, 2.0, 1.0], 1.5) == 24
    assert crossing([0.0, 0.5, 2.5], [4.0, 2.0, 1.0], 1.0) == 2.5
    assert crossing([0, 16, 32, 48], [4.0, 1.0, 2.0, 0.5], 1.5) == pytest.approx(16 * 2.5 / 3)


def test_a_loss_never_reached_is_infinite_and_one_had_before_training_is_at_the_start():
    assert crossing([0, 16, 32], [4.0, 2.0, 1.0], 0.99) == math.inf
    assert crossing([0, 16], [4.0, 2.0], 4.0) == 0
    assert crossing([0, 16, 32], [math.inf, math.inf, 1.0], 2.0) == 32


def test_the_window_that_compiles_counts_as_the_median_of_the_others():
    own = row("ours", 1, 1e-3, [4.0, 3.0, 2.0, 1.0], 1.0) | {"windows": [30.0, 1.0, 2.0]}
    assert elapsed(own) == [0.0, 1.5, 2.5, 4.5]
    assert to_target(own, 1.5) == (40.0, 3.5)


def test_a_median_over_seeds_is_infinite_where_half_of_them_never_got_there():
    assert middle([0.5, math.inf, 0.4]) == 0.5
    assert middle([0.5, math.inf]) == math.inf
    assert middle([0.5, 0.7]) == pytest.approx(0.6)


def test_every_arm_is_read_and_an_unknown_word_refused():
    assert arm_of("ours+1-2-4+deep+accumulate+scaled") == Arm(
        (1, 2, 4), "deep", "accumulate", (1.0, 2.0, 4.0)
    )
    assert len({arm_of(name) for name in ARMS[1:]}) == len(ARMS) - 1 == 15
    with pytest.raises(ValueError, match=r"'ours\+deeep' is no arm"):
        arm_of("ours+deeep")


@pytest.mark.usefixtures("own_random_state")
def test_our_order_of_batches_is_the_one_that_mlx_lm_draws_under_the_seed():
    tables = Corpus().tables("train")[:40]
    np.random.seed(7)
    theirs = iterate_batches([(t.tolist(), 0) for t in tables], 8, WIDTH, loop=True)
    for rows, (batch, _) in islice(zip(training_order(7, 40, 8), theirs, strict=False), 12):
        assert np.array_equal(tables[rows], np.array(batch))


def test_the_validation_asks_for_entities_that_no_training_table_has():
    corpus = Corpus()
    train, valid = corpus.tables("train"), corpus.tables("valid")
    names = {TOKEN[f"entity-{i}"] for i in range(ENTITIES)}
    assert train.shape[1] == valid.shape[1] == WIDTH
    assert not (names & set(train.ravel().tolist())) & set(valid.ravel().tolist())
    assert (train[:, PROMPT_LENGTH - 1] == TOKEN["=>"]).all()
    values = {TOKEN[f"{name}-{i}"] for name, count in VALUES.items() for i in range(count)}
    assert set(valid[:, value_positions()].ravel().tolist()) <= values
    assert max(TOKEN.values()) < VOCABULARY


def test_pretraining_text_knows_every_word_of_the_tables_but_no_table():
    text, tables = Corpus().text(100_000), Corpus().tables("train")
    assert set(tables.ravel().tolist()) <= set(text.ravel().tolist())
    names = {TOKEN[f"entity-{i}"] for i in range(ENTITIES)}
    after = [set(each[:, 1:][each[:, :-1] == TOKEN["=>"]].tolist()) for each in (text, tables)]
    assert after[0]
    assert not after[0] & names
    assert after[1] <= names


def test_every_row_of_the_text_comes_once_an_epoch():
    text = Corpus().text(20_000)
    batches = [text_batch(text, 3, step) for step in range(len(text) // 3)]
    seen = {tuple(each) for each in np.concatenate(batches).tolist()}
    assert seen <= {tuple(each) for each in text.tolist()}
    assert len(seen) >= len(text) - 2


def test_what_is_missing_goes_from_the_grid_to_the_seeds_and_ends():
    rows = whole_study()
    assert missing([], STUDY, "3M") == [Run("3M", "mlx_lm", TUNING_SEED, r) for r in (1e-3, 2e-3)]
    assert missing(rows[:3], STUDY, "3M") == [Run("3M", "ours", TUNING_SEED, 2e-3)]
    assert missing(rows[:4], STUDY, "3M") == [Run("3M", "mlx_lm", seed, 1e-3) for seed in (1, 2)]
    assert missing(rows[:6], STUDY, "3M") == [Run("3M", "ours", seed, 2e-3) for seed in (1, 2)]
    assert missing(rows[:7], STUDY, "3M") == [Run("3M", "ours", 2, 2e-3)]
    assert missing(rows, STUDY, "3M") == []


def test_a_rate_is_chosen_by_the_final_loss_once_the_grid_is_whole_and_never_a_diverged_one():
    rows = whole_study()
    assert chosen_rate(rows, STUDY, "3M", "mlx_lm") == 1e-3
    assert chosen_rate(rows, STUDY, "3M", "ours") == 2e-3
    assert chosen_rate(rows[:3], STUDY, "3M", "ours") is None


def test_the_report_has_the_ratio_of_times_and_says_what_was_not_reached(tmp_path: Path):
    study = Study(["3M"], ["mlx_lm", "ours", "ours+1-2"], 2, [1e-3, 2e-3], {"3M": 32})
    poor = [9.0, 8.0, 7.0]
    more = [row("ours+1-2", seed, 1e-3, poor, 1.0) for seed in (0, 1, 2)]
    more.append(row("ours+1-2", 0, 2e-3, [9.0, 8.5, 8.0], 1.0))
    write_report(tmp_path, [*whole_study(), *more], study)
    text = (tmp_path / "time_to_loss.md").read_text()
    assert "3M: 2 seeds, 32 steps; loss before training 9.00" in text
    rival = "1.0000 (1.0000 to 1.0000) | 50.0% | 125.00 | 32 | 4.00 | 1.00 (1.00 to 1.00)"
    assert f"| mlx_lm | 0.001* | {rival} |" in text
    ours = "0.5000 (0.5000 to 0.5000) | 50.0% | 62.50 | 24 | 1.50 | 0.38 (0.38 to 0.38)"
    assert f"| ours | 0.002* | {ours} |" in text
    assert "| 62.50 | not reached | not reached | not reached |" in text
    for axis in ("steps", "seconds"):
        drawn = (tmp_path / f"3M-{axis}.svg").read_text()
        tree = ElementTree.fromstring(drawn)  # noqa: S314 -- our own document
        assert len(tree.findall(".//{*}polyline")) == len(tree.findall(".//{*}polygon")) == 3
        assert "mlx_lm's final loss, 1.000" in "".join(tree.itertext())


def test_the_report_leaves_out_a_size_without_the_rival(tmp_path: Path):
    write_report(tmp_path, [each for each in whole_study() if each["arm"] == "ours"], STUDY)
    assert (tmp_path / "time_to_loss.md").read_text() == "\n"


def test_rows_are_one_json_object_a_line():
    assert json.loads(json.dumps(whole_study()[1], allow_nan=False))["losses"] == [9.0, None, None]
