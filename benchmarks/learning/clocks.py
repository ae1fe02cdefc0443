"""The tables of PROTOCOL-4.md's third and fifth block: `python -m benchmarks.learning.clocks`.

Of real text no questions are read: each counts by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np

from benchmarks.learning.report import Answers, Difference, interval, right
from benchmarks.learning.stream_report import StreamResults, as_level
from benchmarks.learning.study import (
    GOING_ON,
    STREAM_NIGHTS,
    TIER_ARMS,
    TIERED,
    Row,
    rate_share,
    read_rows,
)

HERE = Path(__file__).parent
NIGHTS = (HERE / "rows-4-nights.jsonl", HERE / "stream-real.jsonl")
WHOLE_RATE = "go-100-50"
TIERS_OF = {"facts": ("facts", "facts-reversed"), "tasks": ("tasks", "tasks-reversed")}
ONE, SLOWER = "one", "slower"  # one tier, and control 1
TIERED_ARMS = tuple(
    arm for arm, name in TIER_ARMS.items() if "-skip" in name or "-accumulate" in name
)
EQUAL_LEARNING = 0.02
LEAD = 0.02


@dataclass(frozen=True)
class Match:
    """A tiered arm less the arm that it is compared with, in final average."""

    arm: str
    other: str
    difference: Difference

    @property
    def wins(self) -> bool:
        """By so many points, with the lower end above 0."""
        return self.difference.mean >= LEAD and self.difference.low > 0


def learnt(results: StreamResults, arm: str) -> float:
    """The mean over nights of what was right after each."""
    return float(results.answers(arm, "learnt", results.seeds(arm)).mean())


def less(results: StreamResults, arm: str, other: str) -> Difference:
    """The final average of an arm less another's, under the seeds that both have."""
    seeds, here = results.seeds(arm, other), results.current
    mine, its = (results.answers(each, "right", seeds) for each in (arm, other))
    return interval((mine - its)[:, here], results.subjects[here])


def by_seed(results: StreamResults, arm: str, other: str) -> Answers:
    """The same under each seed (seeds,)."""
    seeds = results.seeds(arm, other)
    mine, its = (results.answers(each, "right", seeds) for each in (arm, other))
    return np.asarray((mine - its)[:, results.current].mean(axis=1))


def match(results: StreamResults, arm: str, kind: str) -> Match:
    """The arm beside the best final average among a kind's arms that learnt as much.

    If none did, beside the one that learnt most.
    """
    others = [name for name in TIER_ARMS if name.startswith(kind)]
    least = learnt(results, arm) - EQUAL_LEARNING
    equal = [name for name in others if learnt(results, name) >= least]
    most = max(others, key=lambda name: learnt(results, name))
    other = max(equal or [most], key=results.right_share)
    return Match(arm, other, less(results, arm, other))


def matches(results: StreamResults) -> Iterator[tuple[Match, Match]]:
    """Of each tiered arm the matches with one tier and with control 1."""
    for arm in TIERED_ARMS:
        yield match(results, arm, ONE), match(results, arm, SLOWER)


def control_of(arm: str) -> str:
    """Control 1 at a tiered arm's end and rate."""
    end, _, share = arm.split("-")
    return f"{SLOWER}-{end}-{share}"


def one_at_the_rate_of(arm: str) -> str:
    """One tier at a tiered arm's rate."""
    return f"{ONE}-{arm.rpartition('-')[2]}"


def learnt_less(results: StreamResults, arm: str) -> float:
    """What an arm learnt less one tier at its rate, as a share."""
    return learnt(results, arm) - learnt(results, one_at_the_rate_of(arm))


def describe_nights(rows: Sequence[Row], earlier: Sequence[Row]) -> Iterator[str]:
    """Final averages of both rates, the whole rate's less the other's; earlier: of stream-real."""
    yield "| stream | 0.3 | 1 | 1 less 0.3 | by seed | learnt at 0.3, at 1 |"
    yield "|---" * 6 + "|"
    for stream in STREAM_NIGHTS.streams:
        yield describe_stream(rows, stream, stream)
    for stream in ("intents", "four"):
        yield describe_stream(earlier, stream, f"{stream}, earlier")


def describe_stream(rows: Sequence[Row], stream: str, label: str) -> str:
    """The line of a stream in the table of nights."""
    by_arm = [
        sorted((r for r in rows if (r["task"], r["arm"]) == (stream, arm)), key=seed_of)
        for arm in (GOING_ON, WHOLE_RATE)
    ]
    final, after = (
        [np.array([right(row, key) for row in each]) for each in by_arm]
        for key in ("right", "learnt")
    )
    if stream == "facts":
        final = [each[:, StreamResults([], [stream], "").current] for each in final]
    if all(each.all() for each in final):  # an interval of a ceiling says nothing
        cells = ["100", "100", "0"]
    else:
        cells = [*map(as_level, map(interval, final)), str(interval(final[1] - final[0]))]
    cells.append(in_points((final[1] - final[0]).mean(axis=1)))
    cells.append(", ".join(f"{100 * each.mean():.1f}" for each in after))
    return f"| {label} | {' | '.join(cells)} |"


def in_points(shares: Iterable[float]) -> str:
    """Each of some shares in points."""
    return ", ".join(f"{100 * each:+.1f}" for each in shares)


def seed_of(row: Row) -> int:
    """The seed of a row."""
    return int(row["seed"])


def describe_tiers(rows: Sequence[Row]) -> Iterator[str]:
    """What each arm learnt and ended with, by rate, and what it is compared with."""
    of_kinds = {kind: results_of(rows, kind) for kind in TIERS_OF}
    yield "| later nights | facts at 0.1 | 0.3 | 1 | 2 | tasks at 0.1 | 0.3 | 1 | 2 |"
    yield "|---" * 9 + "|"
    for name in TIERED:
        arms = sorted((arm for arm in TIER_ARMS if TIER_ARMS[arm] == name), key=rate_share)
        cells = [
            ""
            if arm is None
            else f"{100 * learnt(each, arm):.0f}, {100 * each.right_share(arm):.1f}"
            for each in of_kinds.values()
            for arm in ([None, *arms, None] if len(arms) == 2 else arms)
        ]
        yield f"| {name} | {' | '.join(cells)} |"
    yield from describe_beside_one(of_kinds)
    yield from describe_nearest(of_kinds)
    yield from describe_beside_control(of_kinds)


def describe_beside_one(of_kinds: Mapping[str, StreamResults]) -> Iterator[str]:
    """Each tiered arm less one tier at its rate."""
    heads = (f"{kind}: final less `one` at that rate | learnt less" for kind in of_kinds)
    yield f"| later nights, rate | {' | '.join(heads)} |"
    yield "|---" * 5 + "|"
    for arm in TIERED_ARMS:
        cells = [
            f"{less(each, arm, one_at_the_rate_of(arm))} | {100 * learnt_less(each, arm):+.0f}"
            for each in of_kinds.values()
        ]
        yield f"| {TIER_ARMS[arm]}, {rate_share(arm):g} | {' | '.join(cells)} |"


def describe_nearest(of_kinds: Mapping[str, StreamResults]) -> Iterator[str]:
    """What came nearest to winning, and how wide the intervals of all matches are."""
    yield (
        "| nearest to winning | less one tier | by seed | less control 1 | by seed "
        "| half-widths of all: least, median, most | less one tier, upper end below 0 |"
    )
    yield "|---" * 7 + "|"
    for kind, results in of_kinds.items():
        found = list(matches(results))
        both = max(found, key=lambda pair: min(each.difference.mean for each in pair))
        cells = [
            cell
            for each in both
            for cell in (
                f"{each.difference}, {each.other}",
                in_points(by_seed(results, each.arm, each.other)),
            )
        ]
        ends = [each.difference for pair in found for each in pair]
        halves = [100 * (each.high - each.low) / 2 for each in ends]
        cells.append(", ".join(f"{f(halves):.0f}" for f in (min, median, max)))
        cells.append(f"{sum(one.difference.high < 0 for one, _ in found)} of {len(found)}")
        yield f"| {kind}: {both[0].arm} | {' | '.join(cells)} |"


def describe_beside_control(of_kinds: Mapping[str, StreamResults]) -> Iterator[str]:
    """Tiered arms less control 1 at their end and rate: means, untested, and single arms."""
    yield "| means less control 1 | all | skip | accumulate | by seed | least | most |"
    yield "|---" * 7 + "|"
    for kind, results in of_kinds.items():
        leads = {arm: less(results, arm, control_of(arm)) for arm in TIERED_ARMS}
        of_ways = [
            [each.mean for arm, each in leads.items() if way in arm]
            for way in ("", "-skip", "-accumulate")
        ]
        of_seeds = np.mean([by_seed(results, arm, control_of(arm)) for arm in leads], axis=0)
        cells = [*(in_points([fmean(each)]) for each in of_ways), in_points(of_seeds)]
        for choose in (min, max):
            arm = choose(leads, key=lambda each: leads[each].mean)
            cells.append(f"{arm}: {leads[arm]}")
        yield f"| {kind}, 16 arms | {' | '.join(cells)} |"


def results_of(rows: Sequence[Row], kind: str) -> StreamResults:
    """Those of both orders of a kind of stream."""
    return StreamResults(rows, TIERS_OF[kind], "geography-base")


if __name__ == "__main__":
    print("\n".join(describe_nights(*map(read_rows, NIGHTS))))
    print("\n".join(describe_tiers(read_rows(HERE / "rows-4-tiers.jsonl"))))
