"""What PROTOCOL-4.md tests, of the rows there are: `python -m benchmarks.learning.apart ROWS`.

A difference of two arms is the mean over tasks of the difference in right answers. Its interval on
these tasks joins what seeds and what questions vary, and takes two seeds; the one in general is
over tasks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.learning.report import Answers, right
from benchmarks.learning.study import REAL_TASKS, Row, read_rows
from nested_core.records.paired_difference import student_t_cdf, student_t_quantile

LEVEL = 1.0  # points
TESTED = (
    ("c", "k"),
    ("c", "c-last"),
    ("c", "c-unclipped"),
    ("c-unclipped-last", "k"),
    ("c", "k-2e-4"),
    ("c", "k-3e-4"),
    ("c", "k-3e-4-corrected"),
    ("k-sorted", "k"),
    ("peft-uncorrected", "k"),
    ("c-2e-4", "c"),
    ("c-3e-4-corrected", "c"),
)
Runs = dict[tuple[str, str], dict[int, Row]]  # by arm and task, then by seed


@dataclass(frozen=True)
class Estimate:
    """A mean in points with its half-width at 95 %, and its two-sided p."""

    mean: float
    half: float
    p: float

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half

    def __str__(self) -> str:
        mean, low, high = map(points, (self.mean, self.low, self.high))
        return f"{mean} ({low} to {high})"


def points(value: float) -> str:
    """One digit, or two where one does not show on which side of LEVEL it lies."""
    digits = 2 if round(abs(value), 1) == LEVEL else 1
    return f"{value:+.{digits}f}"


@dataclass(frozen=True)
class Difference:
    """One arm less another: in each task, on these tasks and in general; `runs` are its pairs.

    here: None with fewer than two seeds of any task: then it is not tested.
    """

    tasks: tuple[float, ...]
    runs: int
    here: Estimate | None
    general: Estimate

    def word(self, p: float) -> str:
        """PROTOCOL-4.md's word for it, by Holm's p."""
        if p < 0.05:
            is_general = self.general.low > 0 or self.general.high < 0
            return "shown in general" if is_general else "shown"
        is_level = self.here and self.here.low >= -LEVEL and self.here.high <= LEVEL
        return "level" if is_level else "not told apart"


def runs_of(rows: Sequence[Row]) -> Runs:
    """The judged adapters; the last step of a run is an arm of its own."""
    runs: Runs = {}
    for row in rows:
        runs.setdefault((row["arm"], row["task"]), {})[row["seed"]] = row
        if "last" in row:
            runs.setdefault((f"{row['arm']}-last", row["task"]), {})[row["seed"]] = row["last"]
    return runs


def difference(
    runs: Runs, one: str, other: str, tasks: Sequence[str] = REAL_TASKS
) -> Difference | None:
    """Of the seeds that both arms have of a task; None where a task has none."""
    pairs = []
    for task in tasks:
        first, second = runs.get((one, task), {}), runs.get((other, task), {})
        seeds = sorted(first.keys() & second.keys())
        if not seeds:
            return None
        pairs.append(100 * np.array([right(first[seed]) - right(second[seed]) for seed in seeds]))
    means = [float(each.mean()) for each in pairs]
    mean, runs_of_both = float(np.mean(means)), sum(map(len, pairs))
    here = None
    if min(map(len, pairs)) > 1:
        freedom = runs_of_both - len(pairs)
        error = math.sqrt(variance_of_seeds(pairs, freedom) + variance_of_questions(pairs))
        here = estimate(mean, error, freedom)
    over_tasks = float(np.std(means, ddof=1)) / math.sqrt(len(means))
    return Difference(tuple(means), runs_of_both, here, estimate(mean, over_tasks, len(means) - 1))


def variance_of_seeds(pairs: Sequence[Answers], freedom: int) -> float:
    """Of the mean over tasks, from what seeds vary within tasks, pooled."""
    by_seed = [each.mean(axis=1) for each in pairs]
    pooled = sum(((each - each.mean()) ** 2).sum() for each in by_seed) / freedom
    return float(pooled * sum(1 / len(each) for each in by_seed) / len(pairs) ** 2)


def variance_of_questions(pairs: Sequence[Answers]) -> float:
    """Of the mean over tasks, from what questions vary within tasks in their means over seeds."""
    of_tasks = [each.mean(axis=0).var(ddof=1) / each.shape[1] for each in pairs]
    return float(sum(of_tasks) / len(pairs) ** 2)


def estimate(mean: float, error: float, freedom: int) -> Estimate:
    """Student's t."""
    if error == 0:
        return Estimate(mean, 0.0, 1.0 if mean == 0 else 0.0)
    p = 2 * (1 - student_t_cdf(abs(mean) / error, freedom))
    return Estimate(mean, student_t_quantile(0.975, freedom) * error, p)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's p of each."""
    adjusted, largest = [0.0] * len(values), 0.0
    order = sorted(range(len(values)), key=values.__getitem__)
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted


def describe(rows: Sequence[Row]) -> list[str]:
    """Two tables in Markdown: the arms' means, and what is tested."""
    runs = runs_of(rows)
    lines = [f"| arm | {' | '.join(REAL_TASKS)} | mean | moved | book | runs |", "|---" * 11 + "|"]
    for arm in dict.fromkeys(arm for arm, _ in runs):
        of_tasks = [list(runs.get((arm, task), {}).values()) for task in REAL_TASKS]
        if not all(of_tasks):
            continue
        columns = []
        for key, scale in (("right_share", 100), ("moved", 1), ("general_loss", 1)):
            values = [[scale * row[key] for row in each] for each in of_tasks]
            columns.append([float(np.mean(each)) for each in values])
        shares, moved, book = columns
        cells = [*(f"{each:.1f}" for each in (*shares, np.mean(shares)))]
        cells += [f"{np.mean(moved):.1f}", f"{np.mean(book):.2f}"]
        lines.append(f"| {arm} | {' | '.join(cells)} | {sum(map(len, of_tasks))} |")
    found = {pair: each for pair in TESTED if (each := difference(runs, *pair))}
    p_here = {pair: each.here.p for pair, each in found.items() if each.here}
    adjusted = dict(zip(p_here, holm([*p_here.values()]), strict=True))
    lines += ["", f"| | {' | '.join(REAL_TASKS)} | pairs | on these | over tasks | p, word |"]
    lines.append("|---" * 11 + "|")
    for pair, each in found.items():
        cells = [*(f"{mean:+.1f}" for mean in each.tasks), str(each.runs)]
        cells += [str(each.here or ""), str(each.general)]
        is_tested = pair in adjusted
        word = f"{adjusted[pair]:.2g}, {each.word(adjusted[pair])}" if is_tested else "not tested"
        lines.append(f"| {' - '.join(pair)} | {' | '.join(cells)} | {word} |")
    return lines


if __name__ == "__main__":
    print("\n".join(describe(read_rows(Path(sys.argv[1])))))
