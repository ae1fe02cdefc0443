"""Tables and plots of the rows there are, and what they say of the claim (PROTOCOL.md)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning.study import (
    ARMS,
    CHOOSING_SEED,
    NO_ADAPTER,
    RATES,
    RATES_FROM,
    Row,
    Study,
    chosen_rate,
)
from nested_core.records.paired_difference import Indices, compare_pairs, student_t_quantile
from nested_core.text.svg_chart import STANDALONE, Chart, Curve, Point, draw_chart

LEAST_GAIN, MARGIN = 0.03, -0.01
COMPARED = (("c", "a"), ("d", "b"), ("c", "b"), ("d", "c"), ("d", "a"), ("e", "d"))
LATER_COMPARED = (
    ("g-deep", "d"),
    ("g-shallow", "d"),
    ("h", "b"),
    ("d", "h"),
    ("c", "k"),
    ("k", "b"),
    ("e", "k"),
    ("e", "c"),
    *((way, other) for way in ("c-long", "c-long-answers", "c-long-32") for other in ("k", "c")),
)
Answers = np.ndarray[Any, np.dtype[np.float64]]  # (seeds, questions), 1 where right


@dataclass(frozen=True)
class Difference:
    """Right answers of one arm minus another's, as a share; the wider of two 95 % intervals."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


class Results:
    """The judged rows of a study, by task, size and arm."""

    def __init__(self, rows: Sequence[Row], study: Study) -> None:
        self.rows, self.study = rows, study

    def of(self, task: str, size: str, arm: str) -> dict[int, Row]:
        """The rows of an arm by seed."""
        key = (task, size, arm)
        mine = (row for row in self.rows if (row["task"], row["size"], row["arm"]) == key)
        return {row["seed"]: row for row in mine if row["seed"] != CHOOSING_SEED}

    def pairs(self, task: str, size: str, one: str, other: str) -> Answers:
        """The difference of every answer (seeds, questions) under the seeds that both have."""
        first, second = self.of(task, size, one), self.of(task, size, other)
        seeds = sorted(first.keys() & second.keys())
        values = [right(first[seed]) - right(second[seed]) for seed in seeds]
        return np.array(values) if values else np.zeros((0, 0))

    def difference(
        self, tasks: Sequence[str], size: str, one: str, other: str
    ) -> Difference | None:
        """Over some tasks, all of which have to be there."""
        pairs = [self.pairs(task, size, one, other) for task in tasks]
        seeds = min(len(each) for each in pairs)
        if seeds == 0:
            return None
        return interval(np.concatenate([each[:seeds] for each in pairs], axis=1))


def interval(differences: Answers, clusters: Indices | None = None) -> Difference:
    """The mean with the wider of two intervals: over questions, and over seeds where there are two.

    Questions of one cluster, numbered in `clusters`, are one draw.
    """
    questions = differences.mean(axis=0)
    drawn = compare_pairs(np.zeros(questions.size), questions, clusters=clusters)
    low, high, seeds = drawn.low, drawn.high, len(differences)
    if seeds > 1:
        by_seed = differences.mean(axis=1)
        half = student_t_quantile(0.975, seeds - 1) * by_seed.std(ddof=1) / math.sqrt(seeds)
        low, high = min(low, drawn.mean - half), max(high, drawn.mean + half)
    return Difference(drawn.mean, low, high)


def right(row: Row, key: str = "right") -> Answers:
    """Which questions a row has right, 1 or 0 each."""
    bits = np.frombuffer(bytes.fromhex(row[key]), np.uint8)
    return np.unpackbits(bits)[: row["rows"]].astype(np.float64)


def mcnemar(differences: Answers) -> float:
    """The exact two-sided p of the questions that only one of two runs has right (questions,)."""
    won, lost = int((differences > 0).sum()), int((differences < 0).sum())
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


def write_report(rows: Sequence[Row], quiet: Sequence[Row], study: Study, out: Path) -> None:
    """Write tables.md and a plot a size into `out`; print the tables."""
    results = Results(rows, study)
    parts = [*comparisons(results), *answers(results), *trials(results), *costs(quiet)]
    text = "\n".join(parts)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text(text, encoding="utf-8")
    for size in study.sizes:
        chart = draw_chart(rates_chart(results, size), STANDALONE)
        if chart:
            (out / f"rates-{size}.svg").write_text(f"{chart}\n", encoding="utf-8")
    print(text)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a Markdown table, with an empty line behind."""
    parts = [head, ["---"] * len(head), *lines]
    return [*(f"| {' | '.join(part)} |" for part in parts), ""]


def answers(results: Results) -> Iterator[str]:
    """What every arm does at every size and task: means over its seeds."""
    head = (
        *("size", "task", "arm", "rate", "seeds", "right %", "loss", "KL", "general loss"),
        *("kept %", "like the task %", "GB"),
    )
    lines = []
    study = results.study
    for size in study.sizes:
        for task in study.tasks:
            for arm in (NO_ADAPTER, *ARMS):
                own = list(results.of(task, size, arm).values())
                if own:
                    lines.append([size, task, arm, rate_of(own[0]), str(len(own)), *means(own)])
    yield "## Answers, means over seeds"
    yield ""
    yield from table(head, lines)


def rate_of(row: Row) -> str:
    """The rate of an arm that chose one, with a mark at the edge of the four."""
    if row["rate"] is None:
        return "its own"
    return f"{row['rate']:g}{'*' if row['rate'] in (min(RATES), max(RATES)) else ''}"


def means(rows: Sequence[Row]) -> list[str]:
    """Means of what is measured, with the range of right answers over the seeds."""
    shares = [100 * row["right_share"] for row in rows]
    spread = f"{statistics.fmean(shares):.1f} ({min(shares):.1f} to {max(shares):.1f})"
    return [
        spread,
        f"{statistics.fmean(row['loss'] for row in rows):.3f}",
        f"{statistics.fmean(row['kl'] for row in rows):.2f}",
        mean_of(rows, "general_loss", "{:.3f}"),
        mean_of(rows, "kept", "{:.1%}"),
        mean_of(rows, "like_task", "{:.1%}"),
        f"{statistics.fmean(row['peak_gb'] for row in rows):.2f}",
    ]


def mean_of(rows: Sequence[Row], key: str, form: str) -> str:
    """The mean of a figure over the rows that have it; empty where none has."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return form.format(statistics.fmean(values)) if values else ""


def over_tasks(results: Results, size: str, one: str, other: str) -> str:
    """Student's t interval over the tasks, each the mean of its questions and seeds."""
    tasks = [results.pairs(task, size, one, other) for task in results.study.tasks]
    means_of_tasks = np.array([pairs.mean() for pairs in tasks if pairs.size])
    if len(means_of_tasks) < 2:
        return ""
    count = len(means_of_tasks)
    half = student_t_quantile(0.975, count - 1) * means_of_tasks.std(ddof=1) / math.sqrt(count)
    mean = means_of_tasks.mean()
    return f"{100 * mean:+.1f} ({100 * (mean - half):+.1f} to {100 * (mean + half):+.1f}), {count}"


def comparisons(results: Results) -> Iterator[str]:
    """Differences in points, the claim's own over all tasks first, and McNemar's test by seed."""
    study = results.study
    lines = []
    for size in study.sizes:
        for one, other in (*COMPARED, *LATER_COMPARED):
            whole = results.difference(study.tasks, size, one, other)
            each = [results.difference([task], size, one, other) for task in study.tasks]
            if any(each):
                tests = [seeds_apart(results, task, size, (one, other)) for task in study.tasks]
                cells = [f"{d}; {t}" if d else "" for d, t in zip(each, tests, strict=True)]
                lines.append(
                    [
                        *(size, f"{one} - {other}", str(whole or "")),
                        over_tasks(results, size, one, other),
                        *(verdict(one, other, whole), *cells),
                    ]
                )
    yield "## Differences in points (95 %), and seeds of which McNemar's test says more and fewer"
    yield ""
    yield from table(
        ("size", "arms", "all tasks", "t over tasks", "claim of PROTOCOL.md", *study.tasks), lines
    )


def seeds_apart(results: Results, task: str, size: str, arms: tuple[str, str]) -> str:
    """Under how many seeds the first arm is better and worse, each with p below 0.05."""
    pairs = results.pairs(task, size, *arms)
    apart = [float(each.mean()) for each in pairs if mcnemar(each) < 0.05]
    return f"{sum(m > 0 for m in apart)} and {sum(m < 0 for m in apart)} of {len(pairs)}"


def verdict(one: str, other: str, difference: Difference | None) -> str:
    """Whether a part of the claim holds, for the two differences that it is about."""
    bound = {("c", "a"): LEAST_GAIN, ("d", "b"): MARGIN}.get((one, other))
    if bound is None or difference is None:
        return ""
    return "holds" if difference.low > bound else "fails"


def trials(results: Results) -> Iterator[str]:
    """The right answers of every rate that was tried, on the rows that choose."""
    study = results.study
    lines = []
    for size in study.sizes:
        for task in study.tasks:
            for arm in (arm for arm in RATES_FROM if RATES_FROM[arm] == arm):
                tried = tried_rates(results.rows, task, size, arm)
                chosen = chosen_rate(results.rows, task, size, arm)
                cells = [
                    f"{'**' * (rate == chosen)}{100 * tried[rate]['right_share']:.1f} "
                    f"({tried[rate]['loss']:.3f}){'**' * (rate == chosen)}"
                    if rate in tried
                    else ""
                    for rate in RATES
                ]
                if tried:
                    lines.append([size, task, arm, *cells])
    yield "## Trials: right % and loss on the rows that choose; the chosen one is bold"
    yield ""
    yield from table(("size", "task", "arm", *(f"{rate:g}" for rate in RATES)), lines)


def costs(quiet: Sequence[Row]) -> Iterator[str]:
    """Seconds and joules of trainings alone on the device; the first turn of each warmed up."""
    lines = []
    for size, task, arm in dict.fromkeys((r["size"], r["task"], r["arm"]) for r in quiet):
        turns = [r for r in quiet if (r["size"], r["task"], r["arm"]) == (size, task, arm)]
        first = min(row["seed"] for row in turns)
        measured = [row for row in turns if row["seed"] > first]
        if measured:
            cells = (
                f"{statistics.median(row[key] for row in measured):.{digits}f} "
                f"({', '.join(f'{row[key]:.{digits}f}' for row in measured)})"
                for key, digits in (("seconds", 1), ("joules", 0), ("peak_gb", 2))
            )
            lines.append([size, task, arm, *cells])
    if lines:
        yield "## One training at a time: median (each turn)"
        yield ""
        yield from table(
            ("size", "task", "arm", "seconds", "joules of the GPU", "GB at most"), lines
        )


def tried_rates(rows: Sequence[Row], task: str, size: str, arm: str) -> Mapping[float, Row]:
    """The choosing rows of an arm by rate."""
    key = (task, size, arm, CHOOSING_SEED)
    mine = (r for r in rows if (r["task"], r["size"], r["arm"], r["seed"]) == key)
    return {row["rate"]: row for row in mine}


def rates_chart(results: Results, size: str) -> Chart:
    """Right answers over rates, of arms b and d in the mean over tasks."""
    curves = []
    for arm in ("b", "d"):
        points = []
        for rate in RATES:
            tried = [tried_rates(results.rows, task, size, arm) for task in results.study.tasks]
            if all(rate in each for each in tried):
                share = statistics.fmean(each[rate]["right_share"] for each in tried)
                points.append(Point(math.log10(rate), 100 * share))
        curves.append(Curve("mlx_lm.lora" if arm == "b" else "ours", points, has_dots=True))
    title = f"Right answers by learning rate, {size}, mean of the tasks"
    return Chart(title, "log10 of the rate", "% right", curves, from_zero=True)
