"""Tables and plots of the streams' rows, and what they decide (PROTOCOL.md, PROTOCOL-3.md)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.learning.report import Answers, Difference, interval, right, table
from benchmarks.learning.streams import read_stream
from benchmarks.learning.study import (
    FRACTIONS,
    GOING_ON,
    POLICY_ARMS,
    SHARES,
    Row,
    Study,
    kind_of,
    rate_share,
    replay_fraction,
)
from nested_core.text.svg_chart import STANDALONE, Chart, Curve, Point, draw_chart

LEAST_AVERAGE = -0.05  # above the joint training's
LEVEL = 0.02  # settings whose final averages differ by no more are level
LEAST_SEEDS = 3  # for anything to be decided
CHOSEN_AMONG = tuple(fraction for fraction in FRACTIONS if 10 <= fraction <= 50)
DRAWN_ARMS = ("joint", *POLICY_ARMS, GOING_ON, "go-100-50", "go-100-0", "alone")


class StreamResults:
    """The rows of one kind of stream and a size, of which the questions of all orders are joined.

    subjects: the number of each question's word (questions,). nights: its night, from 0. current:
    whether its answer is the newest. before: that, of the nights before the last. The seeds of an
    arm are those that have every order. least_transfer: the backward transfer that is asked for.
    data: the folder that streams of real text are read from.
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
        self.nights = np.concatenate([stream.night_of for stream in streams])
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

    def right_share(self, arm: str) -> float:
        """The final average without its interval."""
        return float(self.answers(arm, "right", self.seeds(arm))[:, self.current].mean())

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

    def by_night(self, arm: str) -> list[float]:
        """The share of right answers to each night's questions after the last."""
        final = self.answers(arm, "right", self.seeds(arm)).mean(axis=0)
        count = int(self.nights.max()) + 1
        return [float(final[self.current & (self.nights == n)].mean()) for n in range(count)]

    def verdict(self, arm: str) -> str:
        """Whether the arm is within both bounds: `shown` by the intervals' lower ends.

        Nothing with fewer than LEAST_SEEDS seeds.
        """
        behind = self.behind_joint(arm)
        is_few = len(self.seeds(arm, "joint")) < LEAST_SEEDS
        if behind is None or is_few or arm in ("joint", "alone"):
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
    lines, settings = [], list[str]()
    out.mkdir(parents=True, exist_ok=True)
    for size in dict.fromkeys(row["size"] for row in rows if row["task"] in study.streams):
        by_kind = dict[str, StreamResults]()
        for names in list_groups(study.streams):
            results = StreamResults(rows, names, size, study.least_transfer, data)
            by_kind.setdefault(kind_of(names[0]), results)  # the first is that of all orders
            arms = [arm for arm in study.stream_arms if results.seeds(arm)]
            title = " and ".join(names)
            lines += [[size, title, *cells(results, arm)] for arm in arms]
            for name, draw in (("replay", fractions_chart), ("nights", nights_chart)):
                chart = draw_chart(draw(results, arms, f"{title}, {size}"), STANDALONE)
                if chart:
                    file = out / f"{name}-{'-'.join(names)}-{size}.svg"
                    file.write_text(f"{chart}\n", "utf-8")
        settings += describe_settings(by_kind, size)
    head = (
        *("size", "stream", "arm", "seeds", "learning accuracy", "final average"),
        *("less joint", "backward transfer", "stale", "KL", "seconds", "steps"),
        f"5 and {-100 * study.least_transfer:.0f} points",
    )
    text = "\n".join(
        ["## Streams: % of answers, and points (95 %)", "", *table(head, lines), *settings]
    )
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
    steps = statistics.median(sum(row.get("steps", ())) for row in results.rows(arm))
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
        f"{steps:,.0f}" if steps else "",  # earlier rows have none
        results.verdict(arm),
    ]


def describe_settings(by_kind: Mapping[str, StreamResults], size: str) -> Iterator[str]:
    """The final averages of all shares and fractions, and which of them PROTOCOL-3.md chooses.

    Nothing without every one of them under LEAST_SEEDS seeds.
    """
    arms = {(s, f): f"go-{s}-{f}" for s in SHARES for f in FRACTIONS}
    results = by_kind.values()
    if any(len(each.seeds(*arms.values())) < LEAST_SEEDS for each in results):
        return
    averages = {
        at: statistics.fmean(each.right_share(arm) for each in results) for at, arm in arms.items()
    }
    yield f"## {size}: final average in %, mean over {' and '.join(by_kind)}"
    yield ""
    lines = [
        [f"{share} % of the rate", *(f"{100 * averages[share, f]:.1f}" for f in FRACTIONS)]
        for share in SHARES
    ]
    yield from table(["", *(f"{fraction} % replayed" for fraction in FRACTIONS)], lines)
    share, fraction = choose_setting(averages)
    yield f"Chosen: {share} % of the rate, {fraction} % replayed."
    yield ""


def choose_setting(averages: Mapping[tuple[int, int], float]) -> tuple[int, int]:
    """Share and fraction by PROTOCOL-3.md, of final averages by both.

    Of level shares the greatest, by each one's best fraction; of level fractions the smallest.
    """
    best = {share: max(averages[share, f] for f in CHOSEN_AMONG) for share in SHARES}
    share = max(s for s in SHARES if best[s] >= max(best.values()) - LEVEL)
    fraction = min(f for f in CHOSEN_AMONG if averages[share, f] >= best[share] - LEVEL)
    return share, fraction


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


def nights_chart(results: StreamResults, arms: Sequence[str], title: str) -> Chart:
    """What is left of each night at the end, by arm."""
    curves = [
        Curve(arm, [Point(n, 100 * y) for n, y in enumerate(results.by_night(arm), 1)], True)
        for arm in DRAWN_ARMS
        if arm in arms
    ]
    return Chart(f"After the last night: {title}", "night", "% right", curves, True)
