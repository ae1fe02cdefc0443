"""PROTOCOL-4.md's fourth block, a larger model: its rows, and the figures of RESULTS-4.md."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from benchmarks.learning import larger
from benchmarks.learning.apart import difference, runs_of
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
    assert found.general.low < 0 < found.general.high
    assert "is *not non-inferior*" in TEXT
    points = r"the better of two rates, is (\S+) points \*on these tasks\*, below 0\.\*\*"
    require_figures(TEXT, {points: [found.here.mean]})
    shares = [each for each in found.tasks if each < -2]  # banking77 and clinc150
    assert len(shares) == 2
    require_figures(TEXT, {r"(\d+) % of the sum. c moved": [100 * sum(shares) / sum(found.tasks)]})
    for task in ("banking77", "clinc150"):
        rest = [each for each in LARGER.tasks if each != task]
        without = difference(larger.judged(runs), "c", "k", rest)
        assert without is not None
        assert without.here is not None
        assert without.here.low < 0 < without.here.high
    assert max(larger.chosen_share(runs, arm) for arm in ("c-2e-4", "k-2e-4")) < 0.32
    moved = [
        fmean(row["moved"] for row in ROWS if row["arm"] == arm and row["seed"]) for arm in "ck"
    ]
    require_figures(TEXT, {r"of the sum. c moved (\S+) times as far": [moved[0] / moved[1]]})
    (came,) = re.findall(r"c less k, each at the better of two rates \| 0 to 1 \| (\S+) \|", PAGE)
    assert float(came) == pytest.approx(found.here.mean, abs=0.0501)


def test_one_pair_reached_what_k_has() -> None:
    pairs = [pair for pair in larger.pairs_of(TIMED) if pair[0]["seed"] != larger.WARM_UP]
    assert [c["task"] for c, _ in pairs] == ["banking77", "snips", "clinc150", "nl2bash"]
    reached = [
        c["seconds"] / k["seconds"] for c, k in pairs if c["right_share"] >= k["right_share"]
    ]
    assert len(reached) == 1
    assert "**(a) is not shown**: k's accuracy was reached in one pair of four" in TEXT
    lost = [
        row["seconds"]
        for row, then in zip(TIMED, TIMED[1:], strict=False)
        if row["arm"] == then["arm"] == "c"
    ]
    early = TIMED[:4]  # where c failed at once
    assert [row["arm"] for row in early] == ["k"] * 4
    warm_up = larger.pairs_of(TIMED)[0][0]
    seconds = [row["seconds"] for row in early]
    seconds.insert(1, warm_up["seconds"] / early[0]["seconds"])
    require_figures(
        TEXT,
        {
            r"same k took (\S+) s \(first over first: (\S+)\), (\S+), (\S+) and (\S+), so": seconds,
            r"one c of (\S+) s these five": lost,
        },
    )
    (study,) = (r for r in ROWS if (r["arm"], r["task"], r["seed"]) == ("c", "nl2bash", 1))
    require_figures(TEXT, {r"c on nl2bash had (\S+) % in the study": [100 * study["right_share"]]})


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
    readme = " ".join((LEARNING.parents[1] / "README.md").read_text("utf-8").split())
    (row,) = re.findall(r"\| A larger model, .*? \| (.*?) \| (.*?) \|", readme)
    require_figures(
        " / ".join(row),
        {
            r"^(\S+) % with `init`'s file, (\S+) % at twice": [right("c"), right("c-2e-4")],
            r"lora` (\S+) % at the same .*?, (\S+) % at twice": [right("k"), right("k-2e-4")],
            r"Ours: (\S+), on these tasks (\S+) to (\S+), over tasks (\S+) to (\S+)$": [
                found.here.mean,
                found.here.low,
                found.here.high,
                found.general.low,
                found.general.high,
            ],
        },
    )
    fewer = [-found.here.mean]
    require_figures(readme, {r"a 0.5B model `init`'s file had (\S+) points fewer right": fewer})
    better = (LEARNING.parents[1] / "docs" / "better-adapters.md").read_text("utf-8")
    pattern = r"the same file had (\S+) points fewer right"
    require_figures(" ".join(better.split()), {pattern: fewer})
