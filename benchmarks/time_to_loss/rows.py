"""The file of rows, one a run: what is in it, what is missing, and the rate of each arm.

That is the rate of the grid with the lowest final validation loss under TUNING_SEED, which is none
of the measured seeds. Only what a complete grid has chosen is measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.time_to_loss.arms import RIVAL
from benchmarks.time_to_loss.curves import Row, loss_at

TUNING_SEED = 0
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)


@dataclass(frozen=True)
class Run:
    """One fine-tuning."""

    size: str
    arm: str
    seed: int
    rate: float


@dataclass(frozen=True)
class Study:
    """What is to be in the file; `steps` is the length of the rival's runs, by size."""

    sizes: Sequence[str]
    arms: Sequence[str]
    seeds: int
    rates: Sequence[float]
    steps: dict[str, int]


def read(path: Path) -> list[Row]:
    """The rows of the runs that are done."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_of(row: Row) -> Run:
    """The run that a row is of."""
    return Run(row["size"], row["arm"], row["seed"], row["rate"])


def chosen_rate(rows: Sequence[Row], study: Study, size: str, arm: str) -> float | None:
    """The arm's rate, or None while a run of the grid is missing."""
    tuned = {run_of(row): row for row in rows if row["seed"] == TUNING_SEED}
    grid = [tuned.get(Run(size, arm, TUNING_SEED, rate)) for rate in study.rates]
    found = [row for row in grid if row is not None]
    if len(found) < len(grid):
        return None
    best = min(found, key=lambda row: loss_at(row, study.steps[size]))
    return float(best["rate"])


def measured(rows: Sequence[Row], study: Study, size: str, arm: str) -> dict[int, Row]:
    """The rows of an arm's measured seeds at its rate."""
    rate = chosen_rate(rows, study, size, arm)
    return {
        row["seed"]: row
        for row in rows
        if row["seed"] != TUNING_SEED and run_of(row) == Run(size, arm, row["seed"], rate or 0.0)
    }


def missing(rows: Sequence[Row], study: Study, size: str) -> list[Run]:
    """The next runs of a size, for one process: of the rival, or of all of our arms.

    First every arm's grid, then all seeds of the rival, then ours seed after seed.
    """
    done = {run_of(row) for row in rows}
    sides = ([a for a in study.arms if a == RIVAL], [a for a in study.arms if a != RIVAL])
    for arms in sides:
        grid = [Run(size, arm, TUNING_SEED, rate) for arm in arms for rate in study.rates]
        if wanted := [run for run in grid if run not in done]:
            return wanted
    rates = {arm: chosen_rate(rows, study, size, arm) for arm in study.arms}
    seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + study.seeds)
    for arms in sides:
        runs = [Run(size, arm, seed, rates[arm] or 0.0) for seed in seeds for arm in arms]
        if wanted := [run for run in runs if run not in done]:
            return wanted
    return []
