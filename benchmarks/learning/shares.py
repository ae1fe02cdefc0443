"""The table of PROTOCOL-4.md's second block: `python -m benchmarks.learning.shares ROWS`.

A share of rehearsed rows holds where it keeps the right answers, stops answers like the task's, and
halves what the loss on the book rises above the base's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.learning.apart import LEVEL, Runs, difference, runs_of
from benchmarks.learning.study import NO_ADAPTER, REHEARSAL, REHEARSED, Row, read_rows

WITHOUT = "c"
MOST_LIKE_TASK = 0.05
MOST_OF_THE_RISE = 0.5
NAMES = {NO_ADAPTER: "base", WITHOUT: "0 %"} | {a: f"{100 * s:.0f} %" for a, s in REHEARSED.items()}


def figure(runs: Runs, arm: str, key: str, tasks: Sequence[str] = REHEARSAL.tasks) -> float:
    """The mean over tasks of the mean over seeds."""
    return fmean(fmean(row[key] for row in runs[arm, task].values()) for task in tasks)


def rise_of_the_book(runs: Runs, arm: str) -> float:
    """How much more loss on the book than the base has, in nats a token."""
    return figure(runs, arm, "general_loss") - figure(runs, NO_ADAPTER, "general_loss")


def conditions(runs: Runs, arm: str) -> tuple[bool, bool, bool]:
    """Of right answers, of answers like the task's and of the book: whether each is met."""
    found = difference(runs, arm, WITHOUT, REHEARSAL.tasks)
    here = found and found.here
    return (
        bool(here and here.low > -LEVEL and abs(here.mean) <= LEVEL),
        figure(runs, arm, "like_task") < MOST_LIKE_TASK,
        rise_of_the_book(runs, arm) <= MOST_OF_THE_RISE * rise_of_the_book(runs, WITHOUT),
    )


def describe(rows: Sequence[Row]) -> list[str]:
    """The table in Markdown."""
    runs, tasks = runs_of(rows), REHEARSAL.tasks
    lines = [f"| share | {' | '.join(tasks)} | less 0 % | like the task | kept | book | runs |"]
    lines.append("|---" * 9 + "|")
    for arm, name in NAMES.items():
        cells = [f"{100 * figure(runs, arm, 'right_share', [task]):.1f}" for task in tasks]
        found = difference(runs, arm, WITHOUT, tasks) if arm in REHEARSED else None
        cells.append(str(found.here if found else ""))
        alike = [f"{100 * figure(runs, arm, 'like_task', [task]):.1f}" for task in tasks]
        cells.append(f"{', '.join(alike)}: {100 * figure(runs, arm, 'like_task'):.1f}")
        cells.append(f"{100 * figure(runs, arm, 'kept'):.1f}")
        cells.append(f"{figure(runs, arm, 'general_loss'):.2f}")
        cells.append(str(sum(len(runs[arm, task]) for task in tasks)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for arm in REHEARSED:
        told = ", ".join("met" if met else "not met" for met in conditions(runs, arm))
        lines.append(f"{NAMES[arm]}: right answers, answers like the task, the book: {told}")
    return lines


if __name__ == "__main__":
    print("\n".join(describe(read_rows(Path(sys.argv[1])))))
