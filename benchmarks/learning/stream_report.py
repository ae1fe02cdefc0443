"""Tables and plots of the streams' rows, and which fractions of replay they show (PROTOCOL.md)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.learning.report import Answers, Difference, interval, right, table
from benchmarks.learning.streams import read_stream
from benchmarks.learning.study import Row, Study, kind_of, rate_share, replay_fraction
from nested_core.text.svg_chart import STANDALONE, Chart, Curve, Point, draw_chart

LEAST_AVERAGE = -0.05  # above the joint training's


class StreamResults:
    """The rows of one kind of stream and a size, of which the questions of all orders are joined.

    subjects: the number of each question's word (questions,). current: whether its answer is the
    newest. before: that, of the nights before the last. The seeds of an arm are those that have
    every order. least_transfer: the backward transfer that is asked for. data: the folder that
    streams of real text are read from.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        names: Sequence[str],
        size: str,
        least_transfer: float = Study.least_transfer,
        data: Path | None = None,
    ) -> None:
        self.least_transfer = least_transfer
        streams = [read_stream(name, data) for name in names]
        words = [fact.subject for stream in streams for fact in stream.questions]
        self.subjects = np.unique(words, return_inverse=True)[1].astype(np.int64)
        self.current = np.concatenate([stream.is_current for stream in streams])
        is_last = [stream.night_of == len(stream.nights) - 1 for stream in streams]
        self.before = self.current & ~np.concatenate(is_last)
        self._names = names
        self._rows = {
            (row["arm"], row["seed"], row["task"]): row for row in rows if row["size"] == size
        }

    def seeds(self, *arms: str) -> list[int]:
        """Those of which every order of these arms is there."""
        known = {seed for _, seed, _ in self._rows}
        wanted = [(arm, name) for arm in arms for name in self._names]
        return sorted(s for s in known if all((arm, s, name) in self._rows for arm, name in wanted))

    def rows(self, arm: str) -> list[Row]:
        """Of every seed and order."""
        return [self._rows[arm, seed, name] for seed in self.seeds(arm) for name in self._names]

    def answers(self, arm: str, key: str, seeds: Sequence[int]) -> Answers:
        """(seeds, questions): `learnt` after each question's own night, `right` after the last."""
        own = [[right(self._rows[arm, s, n], key) for n in self._names] for s in seeds]
        return np.array([np.concatenate(orders) for orders in own])

    def learning(self, arm: str) -> Difference:
        """Right answers to each night's questions after it."""
        return interval(self.answers(arm, "learnt", self.seeds(arm)), self.subjects)

    def average(self, arm: str) -> Difference:
        """Right answers to all nights' questions after the last."""
        return self._mean(self.answers(arm, "right", self.seeds(arm)), self.current)

    def transfer(self, arm: str) -> Difference:
        """The answers to earlier nights' questions at the end less those after their own night."""
        final, learnt = (self.answers(arm, key, self.seeds(arm)) for key in ("right", "learnt"))
        return self._mean(final - learnt, self.before)

    def behind_joint(self, arm: str) -> Difference | None:
        """The final average less that of joint training, under the seeds that both have."""
        seeds = self.seeds(arm, "joint")
        if not seeds:
            return None
        own, joint = (self.answers(each, "right", seeds) for each in (arm, "joint"))
        return self._mean(own - joint, self.current)

    def stale(self, arm: str) -> float:
        """The share of answers that changed later of which the adapter still has the old one."""
        return float(self.answers(arm, "right", self.seeds(arm))[:, ~self.current].mean())

    def verdict(self, arm: str) -> str:
        """Whether the arm is within both bounds: `shown` by the intervals' lower ends."""
        behind = self.behind_joint(arm)
        if behind is None or arm in ("joint", "alone"):
            return ""
        transfer, least = self.transfer(arm), self.least_transfer
        if behind.low > LEAST_AVERAGE and transfer.low > least:
            return "shown"
        return "holds" if behind.mean > LEAST_AVERAGE and transfer.mean > least else "no"

    def _mean(
        self, values: Answers, mask: np.ndarray[tuple[int], np.dtype[np.bool_]]
    ) -> Difference:
        return interval(values[:, mask], self.subjects[mask])


def write_stream_report(
    rows: Sequence[Row], study: Study, out: Path, data: Path | None = None
) -> None:
    """Write streams.md and a plot of each kind of stream into `out`; print the table."""
    lines = []
    out.mkdir(parents=True, exist_ok=True)
    for size in dict.fromkeys(row["size"] for row in rows if row["task"] in study.streams):
        for names in list_groups(study.streams):
            results = StreamResults(rows, names, size, study.least_transfer, data)
            arms = [arm for arm in study.stream_arms if results.seeds(arm)]
            title = " and ".join(names)
            lines += [[size, title, *cells(results, arm)] for arm in arms]
            chart = draw_chart(fractions_chart(results, arms, f"{title}, {size}"), STANDALONE)
            if chart:
                (out / f"replay-{'-'.join(names)}-{size}.svg").write_text(f"{chart}\n", "utf-8")
    head = (
        *("size", "stream", "arm", "seeds", "learning accuracy", "final average"),
        *("less joint", "backward transfer", "stale", "KL", "seconds"),
        f"5 and {-100 * study.least_transfer:.0f} points",
    )
    text = "\n".join(["## Streams: % of answers, and points (95 %)", "", *table(head, lines)])
    (out / "streams.md").write_text(text, encoding="utf-8")
    print(text)


def list_groups(streams: Sequence[str]) -> Iterator[Sequence[str]]:
    """Both orders of each kind of stream together, and each alone."""
    for kind in dict.fromkeys(map(kind_of, streams)):
        orders = [name for name in streams if kind_of(name) == kind]
        if len(orders) > 1:
            yield orders
        for name in orders:
            yield [name]


def cells(results: StreamResults, arm: str) -> list[str]:
    """A line of the table; joint training has no nights, so that it learns and loses nothing."""
    is_joint = arm == "joint"
    behind = results.behind_joint(arm)
    has_stale = not results.current.all()
    return [
        arm,
        str(len(results.seeds(arm))),
        "" if is_joint else as_level(results.learning(arm)),
        as_level(results.average(arm)),
        "" if is_joint else str(behind or ""),
        "" if is_joint else str(results.transfer(arm)),
        f"{100 * results.stale(arm):.1f}" if has_stale else "",
        f"{statistics.fmean(row['kl'] for row in results.rows(arm)):.2f}",
        f"{statistics.median(row['seconds'] for row in results.rows(arm)):.1f}",
        results.verdict(arm),
    ]


def as_level(share: Difference) -> str:
    """A share in percent, with its interval."""
    return f"{100 * share.mean:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def fractions_chart(results: StreamResults, arms: Sequence[str], title: str) -> Chart:
    """Learning accuracy and final average over the fraction, with joint training's as a line."""
    replayed = {arm: f for arm in arms if (f := replay_fraction(arm)) is not None}
    curves = []
    for share in dict.fromkeys(map(rate_share, replayed)):
        fractions = sorted((f, arm) for arm, f in replayed.items() if rate_share(arm) == share)
        at = "" if share == 1 else f", {100 * share:g} % of the rate"
        curves += [
            Curve(f"{name}{at}", [Point(100 * f, 100 * of(arm).mean) for f, arm in fractions], True)
            for name, of in (("after its night", results.learning), ("at the end", results.average))
        ]
    if "joint" in arms and replayed:
        level = 100 * results.average("joint").mean
        ends = (min(replayed.values()), max(replayed.values()))
        curves.append(Curve("all at once", [Point(100 * f, level) for f in ends]))
    return Chart(f"Replay: {title}", "% of a batch that is replayed", "% right", curves, True)
