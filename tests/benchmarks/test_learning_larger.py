"""PROTOCOL-4.md's fourth block, a larger model: its rows, and the figures of RESULTS-4.md."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from benchmarks.learning import larger
from benchmarks.learning.apart import runs_of
from benchmarks.learning.study import CHOOSING_SEED, LARGER, read_rows
from tests.benchmarks.page_figures import require_figures

LEARNING = Path(__file__).resolve().parents[2] / "benchmarks" / "learning"
PAGE = (LEARNING / "RESULTS-4.md").read_text()
TEXT = " ".join(PAGE.split())
ROWS = read_rows(LEARNING / "rows-4-larger.jsonl")
TIMED = read_rows(LEARNING / "pairs-4-larger.jsonl")


def test_the_rows_are_all_of_the_protocol_s() -> None:
    known = Counter((row["task"], row["size"], row["arm"], row["seed"]) for row in ROWS)
    planned = {(cell.task, cell.size, cell.arm, cell.seed) for cell in LARGER.cells([])}
    assert known == dict.fromkeys(planned, 1)
    assert {row["commit"] for row in (*ROWS, *TIMED)} == {"5c2b3b6b"}
    assert {row["workers"] for row in ROWS} == {10, 13, 14}
    assert f"| 4 | rows-4-larger.jsonl | {len(ROWS)} | {len(planned)} | 5c2b3b6b | 10 to 14" in TEXT
    assert {row["rows"] for row in ROWS if row["seed"] == CHOOSING_SEED} == {LARGER.counts.choose}
    assert {row["rows"] for row in ROWS if row["seed"] != CHOOSING_SEED} == {LARGER.counts.judge}


def test_the_tables_of_the_page_are_what_the_command_prints() -> None:
    tables = [line for line in larger.describe(ROWS, TIMED) if line.startswith("| ")]
    assert len(tables) == 2 + 4 + 1 + 5
    assert set(tables) <= set(PAGE.splitlines())


def test_k_is_better_at_the_rate_that_the_choosing_rows_take() -> None:
    runs = runs_of(ROWS)
    one, other, found = larger.difference_of_best(runs)
    assert (one, other) == ("c", "k")
    assert found.here
    assert found.here.low < -1
    assert found.here.high < 0
    assert f"**c - k, both at 1e-4: {found.here}"[:-1] in TEXT.replace(" points", "")
    assert "here k has more right answers" in TEXT
    assert max(larger.chosen_share(runs, arm) for arm in ("c-2e-4", "k-2e-4")) < 0.32
    moved = [
        fmean(row["moved"] for row in ROWS if row["arm"] == arm and row["seed"]) for arm in "ck"
    ]
    require_figures(TEXT, {r"made c move (\S+) times as far, which may": [moved[0] / moved[1]]})
    (came,) = re.findall(r"c less k, each at its best \| 0 to 1 \| (\S+) \|", PAGE)
    assert float(came) == pytest.approx(found.here.mean, abs=0.0501)


def test_one_pair_reached_what_k_has() -> None:
    pairs = [pair for pair in larger.pairs_of(TIMED) if pair[0]["seed"] != larger.WARM_UP]
    assert [c["task"] for c, _ in pairs] == ["banking77", "snips", "clinc150", "nl2bash"]
    reached = [
        c["seconds"] / k["seconds"] for c, k in pairs if c["right_share"] >= k["right_share"]
    ]
    assert "was reached in one pair of four" in TEXT
    require_figures(TEXT, {r"in one pair of four, in (\S+) of its seconds": reached})
    lost = [
        row["seconds"]
        for row, then in zip(TIMED, TIMED[1:], strict=False)
        if row["arm"] == then["arm"] == "c"
    ]
    require_figures(TEXT, {r"one c, of (\S+) s, has no k": lost})
    assert [row["arm"] for row in TIMED[:4]] == ["k"] * 4  # where c failed at once


def test_a_pair_is_of_one_task_and_turn_and_the_next_run() -> None:
    def row(task: str, arm: str, seed: int) -> dict[str, Any]:
        return {"task": task, "arm": arm, "seed": seed, "seconds": 1.0, "right_share": 0.5}

    c, k = row("snips", "c", 1), row("snips", "k", 1)
    assert larger.pairs_of([k, c, c, k]) == [(c, k)]
    assert larger.pairs_of([c, row("snips", "k", 2), c, row("e2e", "k", 1)]) == []


def test_the_pages_for_users_have_the_figures_of_the_rows() -> None:
    runs = runs_of(ROWS)
    _, _, found = larger.difference_of_best(runs)
    judged = larger.judged(runs)

    def right(arm: str) -> float:
        of_tasks = [judged[arm, task].values() for task in LARGER.tasks]
        return 100 * fmean(fmean(row["right_share"] for row in rows) for rows in of_tasks)

    assert found.here
    warm_up, *ratios = (c["seconds"] / k["seconds"] for c, k in larger.pairs_of(TIMED))
    readme = " ".join((LEARNING.parents[1] / "README.md").read_text("utf-8").split())
    (row,) = re.findall(r"\| A larger model, .*? \| (.*?) \| (.*?) \|", readme)
    require_figures(
        " / ".join(row),
        {
            r"^(\S+) % with `init`'s file; (\S+) % at twice": [right("c"), right("c-2e-4")],
            r"another GPU: (\S+) to (\S+) of its seconds; first run (\S+) /": [
                min(ratios),
                max(ratios),
                warm_up,
            ],
            r"lora` (\S+) % with the same .*?; (\S+) % at twice": [right("k"), right("k-2e-4")],
            r"\(ours (\S+), (\S+) to (\S+)\)": [
                found.here.mean,
                found.here.low,
                found.here.high,
            ],
        },
    )
    fewer = [-found.here.mean]
    require_figures(readme, {r"0.5B model `init`'s file had (\S+) points fewer right": fewer})
    better = (LEARNING.parents[1] / "docs" / "better-adapters.md").read_text("utf-8")
    pattern = r"the same file had (\S+) points fewer right"
    require_figures(" ".join(better.split()), {pattern: fewer})
