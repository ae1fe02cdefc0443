"""PROTOCOL-4.md's third and fifth block: their arms, and the figures of RESULTS-4.md."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.learning import clocks, streams
from benchmarks.learning.stream_cells import plan_night
from benchmarks.learning.streams import read_stream
from benchmarks.learning.study import (
    STREAM_NIGHTS,
    STREAM_TIERS,
    TIER_ARMS,
    TIERED,
    rate_share,
    read_rows,
)
from nested_core.config.loading import parse_config
from nested_core.optim.tier_assignment import assign_tiers
from tests.benchmarks.page_figures import require_figures

LEARNING = Path(__file__).resolve().parents[2] / "benchmarks" / "learning"
PAGE = (LEARNING / "RESULTS-4.md").read_text()
TEXT = " ".join(PAGE.split())
NIGHTS = read_rows(LEARNING / "rows-4-nights.jsonl")
EARLIER = read_rows(LEARNING / "stream-real.jsonl")
TIERS = read_rows(LEARNING / "rows-4-tiers.jsonl")
KINDS = ("facts", "tasks")
HALF_A_DIGIT = 0.0501
MOST_WORDS = 1200  # beside the tables


def bits(text: str) -> Any:
    return np.array([float(bit) for bit in f"{int('1' + text, 16):b}"[1:]])


def percent(rows: list[dict[str, Any]], key: str) -> float:
    """Of answers in % over rows: those after each night, or at the end of what is still true."""
    shares = []
    for row in rows:
        found = bits(row[key])[: row["rows"]]
        if key == "right" and row["task"] in STREAM_TIERS.streams:
            found = found[read_stream(row["task"]).is_current]
        shares.append(found)
    return 100 * float(np.concatenate(shares).mean())


def of(rows: list[dict[str, Any]], arm: str, *streams: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["arm"] == arm and row["task"] in streams]


def test_the_first_night_is_one_tier_s_and_later_ones_what_the_arm_says() -> None:
    assert len(TIER_ARMS) == 32
    for arm, name in TIER_ARMS.items():
        assert plan_night(arm, 0).share is None
        plan = plan_night(arm, 1)
        assert (plan.share, plan.fraction) == (rate_share(arm), 0.0)
        config = parse_config(
            {"model": "m", "data": "d", "iters": 80, "nested": TIERED[name]}, source=arm
        )
        names = [f"model.layers.{n}.q_proj.lora_a" for n in range(6)]
        tiers = assign_tiers(names, config.nested)
        fastest = {names.index(each) for each in tiers.names(0)}
        expected = {"deep": {4, 5}, "shallow": {0, 1}}
        (end,) = [end for end in expected if end in name] or ["all"]
        assert fastest == expected.get(end, set(range(6)))
        assert all(80 % frequency == 0 for frequency in tiers.frequencies)


def test_the_rows_are_the_protocol_s() -> None:
    nights = {(row["task"], row["arm"], row["seed"]) for row in NIGHTS}
    assert nights == {(c.task, c.arm, c.seed) for c in STREAM_NIGHTS.cells([])}
    assert len(NIGHTS) == 18
    known = {(row["task"], row["arm"], row["seed"]) for row in TIERS}
    planned = [(c.task, c.arm, c.seed) for c in STREAM_TIERS.cells([])]
    assert len(TIERS) == len(known)
    assert known == set(planned[: len(TIERS)])  # the last are dropped first
    assert {row["commit"] for row in (*NIGHTS, *TIERS)} == {"46ce84e8"}
    assert Counter(row["seed"] for row in TIERS) == {1: 128, 2: 128}
    assert {row["workers"] for row in NIGHTS} == {18}
    assert "| 3 | rows-4-nights.jsonl | 18 | 18 | 46ce84e8 | 18, beside six runs" in TEXT
    assert Counter(row["workers"] for row in TIERS) == {15: 252, 2: 4}
    of_tiers = f"| 5 | rows-4-tiers.jsonl | {len(TIERS)} | {len(planned)} | 46ce84e8 "
    assert f"{of_tiers}| 252 of 15, four of two" in TEXT


@pytest.mark.slow("resamples 256 rows")
def test_the_tables_of_the_page_are_what_the_command_prints() -> None:
    printed = [*clocks.describe_nights(NIGHTS, EARLIER), *clocks.describe_tiers(TIERS)]
    tables = [line for line in printed if line.startswith("| ")]
    assert len(tables) == 5 + 3 + 2 + len(TIERED) + 16 + 2 + 2
    assert set(tables) <= set(PAGE.splitlines())


def test_the_table_of_nights_is_that_of_the_rows() -> None:
    for label in (*STREAM_NIGHTS.streams, "intents, earlier", "four, earlier"):
        (line,) = re.findall(rf"^\| {label} \|(.*)\|$", PAGE, re.MULTILINE)
        cells = line.split("|")
        stream, _, is_earlier = label.partition(", ")
        rows_of_both = EARLIER if is_earlier else NIGHTS
        arms = [of(rows_of_both, arm, stream) for arm in ("go-30-50", "go-100-50")]
        final = [percent(rows, "right") for rows in arms]
        told = [float(cell.split()[0]) for cell in cells[:3]]
        assert told == pytest.approx([*final, final[1] - final[0]], abs=HALF_A_DIGIT)
        learnt = [percent(rows, "learnt") for rows in arms]
        assert [float(each) for each in cells[4].split(",")] == pytest.approx(
            learnt, abs=HALF_A_DIGIT
        )
        by_seed = [
            percent([one for one in arms[1] if one["seed"] == seed], "right")
            - percent([one for one in arms[0] if one["seed"] == seed], "right")
            for seed in (1, 2, 3)
        ]
        told = [float(each) for each in cells[3].split(",")]
        assert told == pytest.approx(by_seed, abs=HALF_A_DIGIT)


def test_the_table_of_tiers_is_that_of_the_rows() -> None:
    for name in TIERED:
        (line,) = re.findall(rf"^\| {name} \|(.*)\|$", PAGE, re.MULTILINE)
        told = [cell.split(",") for cell in line.split("|") if cell.strip()]
        arms = sorted((a for a in TIER_ARMS if TIER_ARMS[a] == name), key=rate_share)
        each = [(kind, arm) for kind in ("facts", "tasks") for arm in arms]
        for (learnt, final), (kind, arm) in zip(told, each, strict=True):
            rows = of(TIERS, arm, kind, f"{kind}-reversed")
            assert len(rows) == 4
            assert float(learnt) == pytest.approx(percent(rows, "learnt"), abs=0.501)
            assert float(final) == pytest.approx(percent(rows, "right"), abs=HALF_A_DIGIT)


def test_the_streams_of_text_do_not_agree_so_that_the_default_stays() -> None:
    def both(stream: str, rows: list[dict[str, Any]]) -> list[float]:
        return [percent(of(rows, arm, stream), "right") for arm in ("go-30-50", "go-100-50")]

    intents, four = both("intents", NIGHTS), both("four", NIGHTS)
    assert intents[0] > intents[1]
    assert four[0] < four[1]
    for stream in ("intents", "four"):
        earlier = both(stream, EARLIER)
        assert earlier[0] < earlier[1]
    assert {row["commit"] for row in EARLIER if row["arm"].startswith("go-")} == {"ca12c090"}
    fourth = streams.REAL_TASKS[3]
    after = []
    for arm in ("go-30-50", "go-100-50"):
        rows = of(NIGHTS, arm, "four")
        assert {row["rows"] for row in rows} == {4 * 400}
        after.append(statistics.fmean(bits(row["learnt"])[1200:1600].sum() for row in rows))
    require_figures(
        TEXT,
        {
            r"the whole rate is (\S+) points better": [four[1] - four[0]],
            rf"its night {fourth} had (\d+) of 400 right, at rate 1 (\d+)\.": after,
        },
    )
    replay = " ".join((LEARNING.parents[1] / "docs" / "replay.md").read_text("utf-8").split())
    require_figures(replay, {r"ended (\S+) points lower\]": [four[1] - four[0]]})
    tiny = read_rows(LEARNING / "stream-rates.jsonl")
    for kind in KINDS:  # 0.3 was better there
        shares = [
            percent(of(tiny, f"go-{n}-50", kind, f"{kind}-reversed"), "right") for n in (30, 100)
        ]
        assert shares[0] > shares[1] + 20
    (line,) = re.findall(r"^\| intents \|(.*)\|$", PAGE, re.MULTILINE)
    first, *others = (float(each) for each in line.split("|")[3].split(","))
    assert first < -4 < -0.5 < min(others)  # by seed 1 alone
    low, high = (float(each) for each in re.findall(r"[+-][\d.]+", line.split("|")[2])[1:])
    assert low < 0 < high
    config = parse_config({"model": "m", "data": "d", "iters": 1}, source="test")
    assert config.continual.rate == 1
    assert "`continual.rate` stays 1" in TEXT


def lead(kind: str, arm: str, other: str, seed: int | None = None) -> float:
    """The final average of an arm less another's in points, over both orders."""
    rows = [row for row in TIERS if seed in (None, row["seed"])]
    return percent(of(rows, arm, kind, f"{kind}-reversed"), "right") - percent(
        of(rows, other, kind, f"{kind}-reversed"), "right"
    )


def lines_of(pattern: str) -> list[list[str]]:
    """The cells of the page's lines that begin like that."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if re.match(pattern, line)
    ]


@pytest.mark.slow("resamples 256 rows")
def test_no_tiered_arm_wins_and_the_page_has_the_nearest() -> None:
    for kind, arm in (("facts", "shallow-accumulate-100"), ("tasks", "shallow-skip-100")):
        found = list(clocks.matches(clocks.results_of(TIERS, kind)))
        assert len(found) == 16
        assert not any(one.wins and other.wins for one, other in found)
        least = {one.arm: min(one.difference.mean, o.difference.mean) for one, o in found}
        assert max(least, key=lambda each: least[each]) == arm
        assert max(least.values()) < 0.02  # by the means alone
        (cells,) = lines_of(rf"\| {kind}: {arm} \|")
        for told, of_seeds in (cells[1:3], cells[3:5]):
            mean, other = float(told.split()[0]), told.rpartition(", ")[2]
            assert mean == pytest.approx(lead(kind, arm, other), abs=HALF_A_DIGIT)
            by_seed = [lead(kind, arm, other, seed) for seed in (1, 2)]
            assert [float(e) for e in of_seeds.split(",")] == pytest.approx(
                by_seed, abs=HALF_A_DIGIT
            )
            assert (by_seed[1] >= 2) == (kind == "tasks")
            assert by_seed[0] < 2
        below = sum(one.difference.high < 0 for one, _ in found)
        assert cells[6] == f"{below} of 16"


def test_deep_fast_is_below_one_tier_at_each_rate() -> None:
    lines = lines_of(r"\| (deep|shallow)-(skip|accumulate), ")
    assert len(lines) == 16
    deep: dict[str, list[float]] = {kind: [] for kind in KINDS}
    shown = dict.fromkeys(KINDS, 0)
    for head, *cells in lines:
        name, rate = head.split(", ")
        share = round(100 * float(rate))
        arm, one = f"{name}-{share}", f"one-{share}"
        for kind, (told, learnt) in zip(KINDS, (cells[:2], cells[2:]), strict=True):
            figure = lead(kind, arm, one)
            mean, low, high = (float(each) for each in re.findall(r"[+-][\d.]+", told))
            assert mean == pytest.approx(figure, abs=HALF_A_DIGIT)
            assert low < mean < high
            both = [
                percent(of(TIERS, each, kind, f"{kind}-reversed"), "learnt") for each in (arm, one)
            ]
            assert float(learnt) == pytest.approx(both[0] - both[1], abs=0.501)
            if name.startswith("deep"):
                deep[kind].append(-figure)
                shown[kind] += high < 0
    facts, tasks = deep.values()
    assert len(facts) == len(tasks) == 8
    assert min(*facts, *tasks) > 0
    require_figures(
        TEXT,
        {
            r"facts by (\S+) to (\S+) points \((\d) of 8 upper ends below 0\)": [
                min(facts),
                max(facts),
                shown["facts"],
            ],
            r"tasks by (\S+) to (\S+) \((\d) of 8\)": [min(tasks), max(tasks), shown["tasks"]],
        },
    )
    for page in ("README.md", "docs/nested-learning.md"):
        text = " ".join((LEARNING.parents[1] / page).read_text("utf-8").split())
        require_figures(text, {r"had (\d+) to (\d+) points fewer facts": [min(facts), max(facts)]})


def test_means_of_arms_less_control_1_are_those_of_the_rows() -> None:
    lines = lines_of(r"\| (facts|tasks), 16 arms \|")
    assert [line[0] for line in lines] == [f"{kind}, 16 arms" for kind in KINDS]
    for kind, (_, *cells) in zip(KINDS, lines, strict=True):
        arms = [
            f"{end}-{way}-{share}"
            for way in ("skip", "accumulate")
            for end in ("deep", "shallow")
            for share in (10, 30, 100, 200)
        ]
        controls = {arm: "slower-{0}-{2}".format(*arm.split("-")) for arm in arms}
        leads = {arm: lead(kind, arm, control) for arm, control in controls.items()}
        means = [*leads.values()]
        figures = [statistics.fmean(part) for part in (means, means[:8], means[8:])]
        figures += [
            statistics.fmean(lead(kind, arm, control, seed) for arm, control in controls.items())
            for seed in (1, 2)
        ]
        told = [float(each) for each in ", ".join(cells[:4]).split(", ")]
        assert told == pytest.approx(figures, abs=HALF_A_DIGIT)
        for cell, choose in zip(cells[4:], (min, max), strict=True):
            arm, _, rest = cell.partition(": ")
            assert arm == choose(leads, key=lambda each: leads[each])
            assert float(rest.split()[0]) == pytest.approx(leads[arm], abs=HALF_A_DIGIT)


def test_slow_thirds_have_so_many_updates_a_night() -> None:
    config = parse_config(
        {"model": "m", "data": "d", "iters": 80, "nested": TIERED["deep-skip"]}, source="test"
    )
    _, *slow = (80 // each for each in config.nested.frequencies)
    require_figures(TEXT, {r"slow thirds have (\d+) and (\d+) updates of 80 a night": slow})


@pytest.mark.slow("resamples rows")
def test_an_arm_that_learns_as_much_and_keeps_more_wins() -> None:
    rows = [dict(row) for row in TIERS]
    one = {(r["task"], r["seed"]): r for r in TIERS if r["arm"] == "one-200"}
    whole = {task: "f" * len(row["right"]) for (task, _), row in one.items()}
    for row in rows:
        if row["arm"] == "deep-skip-200":
            row |= {"learnt": one[row["task"], row["seed"]]["learnt"], "right": whole[row["task"]]}
    results = clocks.results_of(rows, "facts")
    wins = [a.arm for a, b in clocks.matches(results) if a.wins and b.wins]
    assert wins == ["deep-skip-200"]
    (pair,) = [p for p in clocks.matches(results) if p[0].arm == "deep-skip-200"]
    assert [each.other for each in pair] == ["one-200", "slower-shallow-200"]


def test_what_learnt_too_little_is_not_compared() -> None:
    results = clocks.results_of(TIERS, "facts")
    arm, least = "shallow-skip-200", clocks.learnt(results, "shallow-skip-200") - 0.02
    other = clocks.match(results, arm, "one").other
    assert clocks.learnt(results, other) >= least
    assert statistics.mean([clocks.learnt(results, "one-100")]) < least
    assert other == "one-200"


def test_the_page_has_at_most_so_many_words_beside_its_tables() -> None:
    lines = [line for line in PAGE.splitlines() if not line.startswith("|")]
    assert len(" ".join(lines).split()) <= MOST_WORDS
