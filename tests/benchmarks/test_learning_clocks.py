"""PROTOCOL-4.md's third and fifth block: their arms, and the figures of RESULTS-4.md."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.learning import clocks
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
TIERS = read_rows(LEARNING / "rows-4-tiers.jsonl")
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
    for text in ("all 18", f"{len(TIERS)} of {len(planned)}", "a fourth, 46ce84e8"):
        assert text in TEXT
    assert Counter(row["workers"] for row in TIERS) == {15: 252, 2: 4}
    assert "four of the 256 on two cores" in TEXT


def test_the_tables_of_the_page_are_what_the_command_prints() -> None:
    printed = [*clocks.describe_nights(NIGHTS), *clocks.describe_tiers(TIERS)]
    tables = [line for line in printed if line.startswith("| ")]
    assert len(tables) == 2 + 3 + len(TIERED)
    assert set(tables) <= set(PAGE.splitlines())


def test_the_table_of_nights_is_that_of_the_rows() -> None:
    for stream in STREAM_NIGHTS.streams:
        (line,) = re.findall(rf"^\| {stream} \|(.*)\|$", PAGE, re.MULTILINE)
        cells = line.split("|")
        arms = [of(NIGHTS, arm, stream) for arm in ("go-30-50", "go-100-50")]
        final = [percent(rows, "right") for rows in arms]
        told = [float(cell.split()[0]) for cell in cells[:3]]
        assert told == pytest.approx([*final, final[1] - final[0]], abs=HALF_A_DIGIT)
        learnt = [percent(rows, "learnt") for rows in arms]
        assert [float(each) for each in cells[3].split(",")] == pytest.approx(
            learnt, abs=HALF_A_DIGIT
        )


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
    earlier = both("intents", read_rows(LEARNING / "stream-real.jsonl"))
    assert earlier[0] < earlier[1]
    found = {
        line.split("|")[1].strip(): [float(e) for e in re.findall(r"[+-][\d.]+", line)]
        for line in clocks.describe_nights(NIGHTS)
    }
    require_figures(
        TEXT,
        {
            r"the whole rate is (\S+) points better \((\S+) to (\S+)\)": found["four"],
            r"not told apart, (\S+) \((\S+) to (\S+)\)": found["intents"],
        },
    )
    assert found["intents"][1] < 0 < found["intents"][2]
    config = parse_config({"model": "m", "data": "d", "iters": 1}, source="test")
    assert config.continual.rate == 1
    assert "`continual.rate` stays 1" in TEXT


def test_no_tiered_arm_wins_and_the_page_has_the_nearest() -> None:
    expected = {}
    for kind, arm, pattern in (
        ("facts", "shallow-accumulate-100", r"nearest on the facts, .*?: (\S+) points on one tier"),
        ("tasks", "shallow-skip-100", r"on the tasks shallow-skip .*?: (\S+) on one tier"),
    ):
        results = clocks.results_of(TIERS, kind)
        found = list(clocks.matches(results))
        assert len(found) == 16
        assert not any(one.wins and other.wins for one, other in found)
        least = {one.arm: min(one.difference.mean, o.difference.mean) for one, o in found}
        assert max(least, key=lambda each: least[each]) == arm
        assert max(least.values()) < 0.02  # by the means alone
        (both,) = [pair for pair in found if pair[0].arm == arm]
        ends = r" \((\S+) to (\S+)\), (\S+) on control 1 \((\S+) to (\S+)\)"
        each = [match.difference for match in both]
        expected[pattern + ends] = [100 * d for one in each for d in (one.mean, one.low, one.high)]
    beside = [100 * clocks.beside_control(clocks.results_of(TIERS, k)) for k in ("facts", "tasks")]
    expected[r"rate tiers are (\S+) points from it on the facts and (\S+) on the tasks"] = beside
    require_figures(TEXT, expected)


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
