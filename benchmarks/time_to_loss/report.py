"""Tables and plots of the rows there are: every arm, those that lose too."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.time_to_loss.arms import RIVAL
from benchmarks.time_to_loss.curves import Row, elapsed, loss_at, losses_of, middle, to_target
from benchmarks.time_to_loss.plots import Chart, Series, draw
from benchmarks.time_to_loss.rows import Study, chosen_rate, measured

COLUMNS = (
    "arm",
    "rate",
    "loss at the end (spread)",
    "values right",
    "ms a step",
    "steps to mlx_lm's loss",
    "seconds",
    "of mlx_lm's time, median (spread)",
)


@dataclass(frozen=True)
class Line:
    """An arm over its seeds; what was never reached is infinite."""

    arm: str
    rate: float
    losses: Sequence[float]
    right: float
    milliseconds: float
    steps: Sequence[float]
    seconds: Sequence[float]
    ratios: Sequence[float]


def write_report(folder: Path, rows: Sequence[Row], study: Study) -> None:
    """Write `time_to_loss.md` and two plots a size; print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for size in study.sizes:
        runs = {arm: measured(rows, study, size, arm) for arm in study.arms}
        if not runs.get(RIVAL):
            continue
        parts.append(table(size, rows, study, runs))
        for axis in ("steps", "seconds"):
            chart = chart_of(size, axis, runs, study)
            (folder / f"{size}-{axis}.svg").write_text(draw(chart), encoding="utf-8")
    text = "\n\n".join(parts) + "\n"
    (folder / "time_to_loss.md").write_text(text, encoding="utf-8")
    print(text)


Runs = Mapping[str, Mapping[int, Row]]


def table(size: str, rows: Sequence[Row], study: Study, runs: Runs) -> str:
    """A size's table in markdown, the quickest arm first."""
    end = study.steps[size]
    rates = {arm: chosen_rate(rows, study, size, arm) or math.nan for arm in runs}
    paired = {arm: own for arm, own in runs.items() if own.keys() & runs[RIVAL].keys()}
    lines = [line_of(arm, rates[arm], own, runs[RIVAL], end) for arm, own in paired.items()]
    lines.sort(key=lambda line: (middle(line.ratios), statistics.fmean(line.losses)))
    before = losses_of(next(iter(runs[RIVAL].values())))[0]
    edges, grid = (min(study.rates), max(study.rates)), (f"{rate:g}" for rate in study.rates)
    head = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    body = [" | ".join(cells(line, edges)) for line in lines]
    return "\n".join(
        [
            f"## {size}: {len(runs[RIVAL])} seeds, {end} steps; loss before training {before:.2f}",
            "",
            *(f"| {each} |" for each in (*head, *body)),
            "",
            f"Rates of the grid {', '.join(grid)}; * is at its edge. Not reached: not within "
            f"{max(row['steps'][-1] for own in runs.values() for row in own.values())} steps.",
        ]
    )


def line_of(
    arm: str, rate: float, own: Mapping[int, Row], rival: Mapping[int, Row], end: int
) -> Line:
    """An arm against the rival's run of the same seed, whose last loss is the target."""
    seeds = sorted(own.keys() & rival.keys())
    targets = {seed: loss_at(rival[seed], end) for seed in seeds}
    reached = [to_target(own[seed], targets[seed]) for seed in seeds]
    rivals = [to_target(rival[seed], targets[seed])[1] for seed in seeds]
    a_window = next(iter(own.values()))["steps"][1]
    return Line(
        arm,
        rate,
        [loss_at(row, end) for row in own.values()],
        statistics.fmean(row["right"][row["steps"].index(end)] for row in own.values()),
        1000 * statistics.median(w for row in own.values() for w in row["windows"][1:]) / a_window,
        [steps for steps, _ in reached],
        [seconds for _, seconds in reached],
        [mine / other for (_, mine), other in zip(reached, rivals, strict=True)],
    )


def cells(line: Line, edges: tuple[float, float]) -> list[str]:
    """A line in words."""
    mean, low, high = statistics.fmean(line.losses), min(line.losses), max(line.losses)
    return [
        line.arm,
        f"{line.rate:g}{'*' if line.rate in edges else ''}",
        f"{mean:.4f} ({low:.4f} to {high:.4f})",
        f"{line.right:.1%}",
        f"{line.milliseconds:.2f}",
        number(middle(line.steps), ".0f"),
        number(middle(line.seconds), ".2f"),
        spread(line.ratios),
    ]


def number(value: float, form: str) -> str:
    """A figure, or that it was never reached."""
    return "not reached" if math.isinf(value) else format(value, form)


def spread(ratios: Sequence[float]) -> str:
    """The median and the range; where some seeds never got there, how many did."""
    there = [ratio for ratio in ratios if math.isfinite(ratio)]
    if not there:
        return "not reached"
    of_all = "" if len(there) == len(ratios) else f", {len(there)} of {len(ratios)} seeds"
    return f"{number(middle(ratios), '.2f')} ({min(there):.2f} to {max(there):.2f}{of_all})"


def chart_of(size: str, axis: str, runs: Runs, study: Study) -> Chart:
    """The validation loss of every arm over steps, or over seconds of training."""
    rival = list(runs[RIVAL].values())
    target = statistics.fmean(loss_at(row, study.steps[size]) for row in rival)
    series = [series_of(arm, list(own.values()), axis) for arm, own in runs.items() if own]
    longest = max(each.places[-1] for each in series)
    if axis == "seconds":
        longest = min(longest, 1.05 * next(s.places[-1] for s in series if s.name == RIVAL))
    title = f"{size}: validation loss, mean and range of {len(rival)} seeds"
    words = "steps" if axis == "steps" else "seconds of training"
    return Chart(title, words, longest, series, target, "mlx_lm's final loss")


def series_of(arm: str, rows: Sequence[Row], axis: str) -> Series:
    """The mean and the range over seeds at each look; its place in seconds is the seeds' median."""
    losses = list(zip(*map(losses_of, rows), strict=True))
    times = list(zip(*map(elapsed, rows), strict=True))
    places = rows[0]["steps"] if axis == "steps" else [statistics.median(each) for each in times]
    means = [statistics.fmean(each) for each in losses]
    return Series(
        arm, places, means, [min(each) for each in losses], [max(each) for each in losses]
    )
