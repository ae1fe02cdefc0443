"""The tables of PROTOCOL-4.md's fourth block: `python -m benchmarks.learning.larger ROWS PAIRS`.

Each side's rate is the one with more right answers over tasks on the rows that choose. A pair is a
whole command of c and the one of k that came next, of one task and seed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from benchmarks.learning.apart import Difference, Runs, difference, runs_of
from benchmarks.learning.study import CHOOSING_SEED, LARGER, Row, read_rows

SIDES = {"c": ("c", "c-2e-4"), "k": ("k", "k-2e-4")}
WARM_UP = 0  # turn


def judged(runs: Runs) -> Runs:
    """Those of the seeds that are compared."""
    return {
        key: {seed: row for seed, row in rows.items() if seed != CHOOSING_SEED}
        for key, rows in runs.items()
    }


def chosen_share(runs: Runs, arm: str) -> float:
    """Of the rows that choose, the share of right answers over tasks."""
    return fmean(runs[arm, task][CHOOSING_SEED]["right_share"] for task in LARGER.tasks)


def difference_of_best(runs: Runs) -> tuple[str, str, Difference]:
    """The arm of c and of k at its best rate, and what the first has more."""
    one, other = (max(arms, key=lambda arm: chosen_share(runs, arm)) for arms in SIDES.values())
    found = difference(judged(runs), one, other, LARGER.tasks)
    if found is None:
        raise SystemExit("A task has no pair of seeds yet.")
    return one, other, found


def pairs_of(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Each run of c with the one of k that came next."""
    key = ("task", "seed")
    return [
        (one, other)
        for one, other in pairwise(rows)
        if (one["arm"], other["arm"]) == ("c", "k") and all(one[k] == other[k] for k in key)
    ]


def describe(rows: Sequence[Row], timed: Sequence[Row]) -> list[str]:
    """Two tables in Markdown: right answers, and seconds of whole commands."""
    runs, tasks = runs_of(rows), LARGER.tasks
    later = judged(runs)
    lines = [f"| arm | {' | '.join(tasks)} | mean | rows that choose | moved | runs |"]
    lines.append("|---" * (len(tasks) + 5) + "|")
    for arm in (arm for arms in SIDES.values() for arm in arms):
        of_tasks = [list(later[arm, task].values()) for task in tasks]
        shares = [100 * fmean(row["right_share"] for row in each) for each in of_tasks]
        moved = fmean(fmean(row["moved"] for row in each) for each in of_tasks)
        cells = [f"{each:.1f}" for each in (*shares, fmean(shares))]
        cells += [f"{100 * chosen_share(runs, arm):.1f}", f"{moved:.1f}"]
        lines.append(f"| 0.5B {arm} | {' | '.join(cells)} | {sum(map(len, of_tasks))} |")
    one, other, found = difference_of_best(runs)
    cells = [*(f"{each:+.1f}" for each in found.tasks), str(found.here)]
    cells.append(f"over tasks {found.general}")
    lines.append(f"| 0.5B {one} - {other} | {' | '.join(cells)} |  | {found.runs} pairs |")
    lines += ["", "| task, turn | c | k | ratio | right answers of c, of k |", "|---" * 5 + "|"]
    for c, k in pairs_of(timed):
        name = f"{c['task']}, {'warm-up' if c['seed'] == WARM_UP else c['seed']}"
        seconds = f"{c['seconds']:.1f} s | {k['seconds']:.1f} s"
        shares = [100 * row["right_share"] for row in (c, k)]
        told = f"{shares[0]:.1f}, {shares[1]:.1f}"
        told += "" if shares[0] >= shares[1] else ": not reached"
        lines.append(f"| {name} | {seconds} | {c['seconds'] / k['seconds']:.2f} | {told} |")
    return lines


if __name__ == "__main__":
    print("\n".join(describe(*(read_rows(Path(name)) for name in sys.argv[1:3]))))
