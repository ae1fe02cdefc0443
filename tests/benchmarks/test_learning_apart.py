"""PROTOCOL-4.md's arms and questions, its tests, and the figures of RESULTS-4.md from the rows."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from mlx.optimizers import Adam
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import iterate_batches
from mlx_lm.tuner.utils import build_schedule

from benchmarks.learning import apart, arms, fresh, pairs
from benchmarks.learning.apart import TESTED, holm
from benchmarks.learning.study import APART, FULL, LIKE_K, REAL, REAL_TASKS, Cell, read_rows
from benchmarks.learning.tasks import GEOGRAPHY, READERS, Counts, Row, read_task
from tests.benchmarks.page_figures import require_figures

pytestmark = pytest.mark.slow("computes the study's intervals again")

LEARNING = Path(__file__).resolve().parents[2] / "benchmarks" / "learning"
BASES = GEOGRAPHY.parent
PAGE = (LEARNING / "RESULTS-4.md").read_text()
ROWS = read_rows(LEARNING / "rows-4.jsonl")
HALF_A_DIGIT = 0.0501


def test_a_fresh_question_is_one_that_no_study_has_trained_on_chosen_by_or_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, judge = ([Row(f"{kind} {n}", "yes") for n in range(40)] for kind in ("train", "judge"))
    monkeypatch.setitem(READERS, "snips", lambda _: [train, train, [*judge, Row("TRAIN 3", "no")]])
    monkeypatch.setattr(fresh, "FULL", replace(FULL, tasks=()))
    monkeypatch.setattr(fresh, "REAL", replace(REAL, counts=Counts(6, 3, 30)))
    monkeypatch.setattr(fresh, "STREAMS", ())
    counts = Counts(6, 3, 20, is_fresh=True)
    before = read_task("snips", tmp_path, Counts(6, 3, 30))
    splits = fresh.read_fresh("snips", tmp_path, counts)
    assert (splits.train, splits.choose) == (before.train, before.choose)
    known = {row.prompt.casefold() for row in (*before.train, *before.choose, *before.judge)}
    asked = {row.prompt.casefold() for row in splits.judge}
    assert (len(asked), asked & known) == (20, set())
    assert {row.prompt for row in judge} - known < asked
    assert splits == fresh.read_fresh("snips", tmp_path, counts)


def test_k_at_another_rate_has_it_in_its_schedule_and_its_correction_in_its_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {
        "learning_rate": 1e-4,
        "batch_size": 8,
        "max_seq_length": 64,
        "mask_prompt": True,
        "lora_parameters": {"rank": 8, "alpha": 160},
        "training": {"epochs": 3, "warmup_steps": 0.05},
    }
    monkeypatch.setattr(arms, "suggest", lambda _base, _folder: written)
    read_task("geography", None, Counts()).write(tmp_path / "data")
    settings = {arm: arms.of_init(BASES, tmp_path, changes) for arm, changes in LIKE_K.items()}
    base = GEOGRAPHY.with_name("geography-base")
    files = {arm: pairs.commands(arm, base, tmp_path, 3)[-3:] for arm in pairs.ARMS}
    assert files["k"][1:] == ["-c", str(tmp_path / "k.yaml")]
    of_k = json.loads((tmp_path / "k.yaml").read_text())
    assert of_k.items() >= {**settings["k"], "seed": 3, "num_layers": -1}.items()
    assert json.loads((tmp_path / "c.yaml").read_text()) == written | {"seed": 3}
    own, other = settings["k"], settings["k-3e-4-corrected"]
    assert settings["k-sorted"] == own
    assert (own["learning_rate"], own["optimizer_config"]) == (1e-4, {})
    assert own["lr_schedule"]["arguments"] == [1e-4, 14, 1e-5]
    assert other["lr_schedule"]["arguments"] == [3e-4, 14, pytest.approx(3e-5)]
    assert other["optimizer_config"] == {"adam": {"bias_correction": True}}
    assert settings["k-3e-4"]["optimizer_config"] == {}


def test_with_its_rates_an_adam_that_corrects_its_bias_moves_as_mlx_s_that_does_not() -> None:
    schedule = {"name": "cosine_decay", "arguments": [1e-2, 24, 1e-3], "warmup": 6}
    plain, rates = (
        arms.update_rates({"lr_schedule": schedule, "iters": 30}, corrects=corrects)
        for corrects in (True, False)
    )
    theirs = build_schedule(schedule)  # which begins to fall one update later
    assert plain[:7] == pytest.approx([float(theirs(mx.array(n))) for n in range(7)])
    assert plain[7:] == pytest.approx([float(theirs(mx.array(n))) for n in range(8, 31)])
    dice = np.random.default_rng(1)
    gradients = dice.normal(size=(30, 5)) * np.linspace(9, 1, 30)[:, None]
    adam, here = Adam(0.0), mx.zeros(5)
    place, first, second = np.zeros(5), np.zeros(5), np.zeros(5)
    for step, gradient in enumerate(gradients, 1):
        adam.learning_rate = mx.array(plain[step - 1])
        here = adam.apply_gradients({"x": mx.array(gradient)}, {"x": here})["x"]
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        corrected = first / (1 - 0.9**step), second / (1 - 0.999**step)
        place -= rates[step - 1] * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    assert np.array(here) == pytest.approx(place, rel=1e-3, abs=1e-5)


@pytest.mark.usefixtures("own_random_state")
def test_k_sorted_has_rows_of_like_length_together_which_mlx_lm_has_not() -> None:
    class Rows(list[dict[str, int]]):
        def process(self, row: dict[str, int]) -> tuple[list[int], int]:
            return [7] * row["tokens"], 0

    def widths() -> list[int]:
        rows = CacheDataset(Rows([{"tokens": 10 if n % 2 else 60} for n in range(8)]))
        return sorted(batch.shape[1] for batch, _ in iterate_batches(rows, 2, 64))

    assert widths() == [64, 64, 64, 64]
    with patch.object(CacheDataset, "itemlen", arms.count_tokens):
        assert widths() == [33, 33, 64, 64]


@pytest.mark.slow("trains an adapter")
@pytest.mark.slow("trains and judges a run of its own")
def test_the_last_step_of_a_run_is_judged_beside_the_one_that_it_offers() -> None:
    study = replace(APART, tasks=("geography",), sizes=("geography-base",))
    row = arms.run_cell(Cell("geography", "geography-base", "c", 1), study, BASES, None)
    assert row["last"]["step"] == 100
    assert row["last"]["rows"] == row["rows"] == 15
    assert row["moved"] > 0 < row["last"]["moved"]
    assert apart.runs_of([row]).keys() == {("c", "geography"), ("c-last", "geography")}


def test_holm_multiplies_the_least_p_by_all_and_never_falls() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def answers(arm: str) -> dict[tuple[str, int], np.ndarray[Any, np.dtype[np.float64]]]:
    """Of an arm, by task and seed, which questions are right, in %."""
    found = {}
    for row in ROWS:
        judged = row.get("last") if arm.endswith("-last") else row
        if judged and row["arm"] == arm.removesuffix("-last"):
            bits = f"{int('1' + judged['right'], 16):b}"[1 : judged["rows"] + 1]
            found[row["task"], row["seed"]] = 100 * np.array([float(bit) for bit in bits])
    return found


def pairs_of(one: str, other: str) -> dict[str, Any]:
    """Of each task the differences (seeds, questions) under the seeds that both arms have."""
    first, second = answers(one), answers(other)
    pairs: dict[str, list[Any]] = {task: [] for task in REAL_TASKS}
    for task, seed in sorted(first.keys() & second.keys()):
        pairs[task].append(first[task, seed] - second[task, seed])
    return {task: np.array(rows) for task, rows in pairs.items()}


def interval(mean: float, error: float, freedom: int) -> list[float]:
    from scipy import stats  # it takes a second, and all tests are collected each time

    half = float(stats.t.ppf(0.975, freedom)) * error
    return [mean, mean - half, mean + half]


def here(one: str, other: str) -> tuple[list[float], float]:
    """The interval on these tasks and its p."""
    from scipy import stats

    pairs = pairs_of(one, other)
    seeds = [rows.mean(axis=1) for rows in pairs.values()]
    freedom = sum(len(each) - 1 for each in seeds)
    pooled = sum(float(((each - each.mean()) ** 2).sum()) for each in seeds) / freedom
    variance = sum(pooled / len(each) for each in seeds)
    variance += sum(float(rows.mean(axis=0).var(ddof=1)) / 1000 for rows in pairs.values())
    mean, error = statistics.fmean(float(each.mean()) for each in seeds), math.sqrt(variance) / 6
    return interval(mean, error, freedom), float(2 * stats.t.sf(abs(mean) / error, freedom))


def over_tasks(one: str, other: str) -> list[float]:
    means = [float(rows.mean()) for rows in pairs_of(one, other).values()]
    return interval(statistics.fmean(means), statistics.stdev(means) / math.sqrt(6), 5)


def cells_of(line: str) -> list[str]:
    (found,) = re.findall(rf"^\| {re.escape(line)}(?:: [^|]*)? \|(.*)\|$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in found.split("|")]


def numbers(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"[+-]?\d+\.\d+", text)]


ARMS = [
    *("c", "c-last", "c-unclipped", "c-unclipped-last", "k", "k-2e-4", "k-3e-4"),
    *("k-3e-4-corrected", "k-sorted", "peft-uncorrected", "c-2e-4", "c-3e-4-corrected"),
]


def mean_over_tasks(arm: str, key: str) -> float:
    """Of a figure of the rows, each task the mean of its seeds."""
    is_last = arm.endswith("-last")
    mine = [row for row in ROWS if row["arm"] == arm.removesuffix("-last")]
    of_tasks = [
        [(row["last"] if is_last else row)[key] for row in mine if row["task"] == task]
        for task in REAL_TASKS
    ]
    return statistics.fmean(map(statistics.fmean, of_tasks))


@pytest.mark.parametrize("arm", ARMS)
def test_the_table_of_arms_is_that_of_the_rows(arm: str) -> None:
    cells, found = cells_of(arm), answers(arm)
    shares = []
    for task in REAL_TASKS:
        shares.append(statistics.fmean(float(r.mean()) for (t, _), r in found.items() if t == task))
    assert [float(cell) for cell in cells[:6]] == pytest.approx(shares, abs=HALF_A_DIGIT)
    assert float(cells[6]) == pytest.approx(statistics.fmean(shares), abs=HALF_A_DIGIT)
    assert float(cells[7]) == pytest.approx(mean_over_tasks(arm, "moved"), abs=HALF_A_DIGIT)
    assert float(cells[8]) == pytest.approx(mean_over_tasks(arm, "general_loss"), abs=0.00501)
    assert int(cells[9]) == len(found)


def test_every_row_is_of_the_protocol_s_questions_and_has_its_place_on_the_page() -> None:
    assert {row["rows"] for row in ROWS} == {1000}
    assert {row["commit"] for row in ROWS} == {"9f87358f", "cf0a9582"}
    assert sorted(row["workers"] for row in ROWS) == [1] + [12] * 179
    known = [(row["arm"], row["task"], row["seed"]) for row in ROWS]
    assert len(known) == len(set(known)) == len(list(APART.cells([]))) == 180
    assert "| 1 | rows-4.jsonl | 180 | 180 | 9f87358f, cf0a9582 | 12 (planned: ten) |" in PAGE
    assert {arm for arm, _, _ in known} == {a for a in ARMS if not a.endswith("-last")}


def test_every_difference_is_that_of_the_rows_and_has_the_protocol_s_word_for_it() -> None:
    run = {arm for arm, *_ in ((row["arm"],) for row in ROWS)}
    told = [pair for pair in TESTED if set(pair) <= run | {f"{arm}-last" for arm in run}]
    lines = re.findall(r"^\| (\S+ - \S+) \|", PAGE, re.MULTILINE)
    assert sorted(lines) == sorted(" - ".join(pair) for pair in told)
    assert len(told) == len(TESTED) == 11
    p_values = dict(zip(told, holm([here(*pair)[1] for pair in told]), strict=True))
    for pair in told:
        cells, pairs = cells_of(" - ".join(pair)), pairs_of(*pair)
        means = [float(rows.mean()) for rows in pairs.values()]
        assert [float(cell) for cell in cells[:6]] == pytest.approx(means, abs=HALF_A_DIGIT)
        assert int(cells[6]) == sum(map(len, pairs.values()))
        general = over_tasks(*pair)
        assert numbers(cells[8]) == pytest.approx(general, abs=HALF_A_DIGIT)
        on_these, p = here(*pair)[0], p_values[pair]
        assert numbers(cells[7]) == pytest.approx(on_these, abs=HALF_A_DIGIT)
        value, word = cells[9].split(", ")
        assert float(value) == pytest.approx(p, rel=0.05)
        is_general = general[1] > 0 or general[2] < 0
        shown = "shown in general" if is_general else "shown"
        level = "level" if on_these[1] >= -1 and on_these[2] <= 1 else "not told apart"
        assert word == (shown if p < 0.05 else level)


def test_what_the_page_concludes_is_that_of_the_rows() -> None:
    def lead(one: str, other: str) -> float:
        return over_tasks(one, other)[0]

    def moved(arm: str) -> float:
        return mean_over_tasks(arm, "moved")

    def of_the_book(arm: str) -> float:
        return mean_over_tasks(arm, "general_loss")

    faster = {task: float(rows.mean()) for task, rows in pairs_of("c-2e-4", "c").items()}
    assert min(sorted(faster.values())[2:]) > 0  # below c on two tasks at most
    clipped = pairs_of("c", "c-unclipped")
    means = {task: float(rows.mean()) for task, rows in clipped.items()}
    assert min(means.values()) > 0
    others = [mean for task, mean in means.items() if task != "snips"]
    expected: dict[str, list[float]] = {
        r"in general\*, (\S+) of c - k, where": [lead("c", "c-unclipped") / lead("c", "k")],
        r"Snips is (\d+) % of the sum; without it the mean is (\S+) \((\S+) to (\S+) over five\)": [
            100 * means["snips"] / sum(means.values()),
            *interval(statistics.fmean(others), statistics.stdev(others) / math.sqrt(5), 4),
        ],
        r"and mlx_lm.lora are (\S+) points apart": [-lead("c-unclipped-last", "k")],
        r"Clipping made c move (\S+) times as far": [moved("c") / moved("c-unclipped")],
        r"The book pays: (\S+) nats against (\S+) of c; 2e-4 has (\S+)\.": [
            mean_over_tasks(arm, "general_loss") for arm in ("k-3e-4", "c", "k-2e-4")
        ],
        r"below\*\*\*, and moves a third as far as k-3e-4 \((\S+)\)": [
            moved("k-3e-4-corrected") / moved("k-3e-4")
        ],
        r"above c, (\S+) points \(snips is (\d+) % of": [
            lead("c-2e-4", "c"),
            100 * faster["snips"] / sum(faster.values()),
        ],
        r"and has (\S+) nats more of the book": [of_the_book("c-2e-4") - of_the_book("c")],
        r"is \*level\*, with (\S+) nats less": [of_the_book("c") - of_the_book("c-3e-4-corrected")],
    }
    otherwise = re.findall(r"^\| (\S+) less (\S+) \| (\S+) to (\S+) \| (\S+) \|$", PAGE, re.M)
    assert len(otherwise) == 6
    for one, other, least, most, came in otherwise:
        assert float(came) == pytest.approx(lead(one, other), abs=HALF_A_DIGIT)
        assert not float(least) <= lead(one, other) <= float(most)
    assert moved("peft-uncorrected") == pytest.approx(moved("k"), abs=0.05)
    text = " ".join(PAGE.split())
    require_figures(text, expected)
    better = " ".join((LEARNING.parents[1] / "docs" / "better-adapters.md").read_text().split())
    pattern = r"gave one model (\S+) points more .*? moved it (\S+) times as far"
    clipping = [lead("c", "c-unclipped"), moved("c") / moved("c-unclipped")]
    require_figures(better, {pattern: clipping})
    behind = [float(rows.mean()) < 0 for rows in pairs_of("c", "k-3e-4").values()]
    assert f"behind on {['five'][sum(behind) - 5]} of six tasks" in text


def test_what_was_expected_and_came_is_not_told() -> None:
    assert over_tasks("c", "k")[0] == pytest.approx(2, abs=0.5)
    assert abs(over_tasks("k-2e-4", "c")[0]) < 0.5
    assert abs(over_tasks("peft-uncorrected", "k")[0]) < 1
    assert 1.1 < mean_over_tasks("c", "moved") / mean_over_tasks("k", "moved") < 2
    assert "(the rest came as expected):" in PAGE


def test_the_commits_of_the_arms_are_those_of_the_page() -> None:
    first = {(row["arm"], row["seed"]) for row in ROWS if row["commit"] == "9f87358f"}
    second = {(row["arm"], row["seed"]) for row in ROWS if row["commit"] == "cf0a9582"}
    early = {row["arm"] for row in ROWS} - {"c-2e-4", "c-3e-4-corrected"}
    assert first & second == set()
    assert first == {(arm, 1) for arm in early} | {("c", 2), ("c-unclipped", 2)}
    text = " ".join(PAGE.split())
    assert "seed 1 of all but c-2e-4 and c-3e-4-corrected, of c and c-unclipped seed 2 too" in text


def test_nine_runs_have_the_loss_on_the_book_that_the_second_study_has() -> None:
    def losses(file: str) -> set[tuple[str, str, int, float]]:
        rows = read_rows(LEARNING / file)
        return {(r["arm"], r["task"], r["seed"], r["general_loss"]) for r in rows}

    shared = {row[:3] for row in losses("rows-2.jsonl") & losses("rows-4.jsonl")}
    of_c = {("c", task, seed) for task in ("banking77", "clinc150") for seed in (1, 2, 3)}
    assert shared == of_c | {("k", "snips", seed) for seed in (1, 2, 3)}
    assert ": nine runs have its book loss to the last digit" in PAGE


def test_an_end_that_rounds_to_the_bound_of_level_has_two_digits() -> None:
    assert str(apart.Estimate(-0.1, 0.92, 0.9)) == "-0.1 (-1.02 to +0.8)"
    assert str(apart.Estimate(0.3, 0.67, 0.9)) == "+0.3 (-0.4 to +0.97)"


def test_the_command_prints_the_tables_of_the_page() -> None:
    for line in apart.describe(ROWS):
        head, _, rest = line.partition(" |")
        if re.match(r"\| (?:c|k|peft)", head):
            (found,) = re.findall(rf"^{re.escape(head)}(?:: [^|]*)? \|(.*)$", PAGE, re.MULTILINE)
            assert found.replace(" ", "") == rest.replace(" ", "")
    assert json.loads((LEARNING / "rows-4.jsonl").read_text().splitlines()[0])["arm"]
