"""The tables of PROTOCOL-4.md's third and fifth block: `python -m benchmarks.learning.clocks`.

Of real text no questions are read: each counts by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.learning.report import Difference, interval, right
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
WHOLE_RATE = "go-100-50"
TIERS_OF = {"facts": ("facts", "facts-reversed"), "tasks": ("tasks", "tasks-reversed")}
ONE, SLOWER = "one", "slower"  # one tier, and control 1
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


def match(results: StreamResults, arm: str, kind: str) -> Match:
    """The arm beside the best final average among a kind's arms that learnt as much.

    If none did, beside the one that learnt most.
    """
    others = [name for name in TIER_ARMS if name.startswith(kind)]
    least = learnt(results, arm) - EQUAL_LEARNING
    equal = [name for name in others if learnt(results, name) >= least]
    most = max(others, key=lambda name: learnt(results, name))
    other = max(equal or [most], key=results.right_share)
    seeds = results.seeds(arm, other)
    mine, its = (results.answers(each, "right", seeds) for each in (arm, other))
    here = results.current
    return Match(arm, other, interval((mine - its)[:, here], results.subjects[here]))


def matches(results: StreamResults) -> Iterator[tuple[Match, Match]]:
    """Of each tiered arm the matches with one tier and with control 1."""
    for arm, name in TIER_ARMS.items():
        if "-skip" in name or "-accumulate" in name:
            yield match(results, arm, ONE), match(results, arm, SLOWER)


def beside_control(results: StreamResults) -> float:
    """The mean final average of tiered arms less that of control 1 at their end and rate."""
    leads = []
    for arm, name in TIER_ARMS.items():
        if "-skip" in name or "-accumulate" in name:
            end, _, share = arm.split("-")
            control = f"{SLOWER}-{end}-{share}"
            leads.append(results.right_share(arm) - results.right_share(control))
    return fmean(leads)


def describe_nights(rows: Sequence[Row]) -> Iterator[str]:
    """Final averages of both rates, and the whole rate's less the other's."""
    yield "| stream | 0.3 | 1 | 1 less 0.3 | learnt at 0.3, at 1 |"
    yield "|---" * 5 + "|"
    for stream in STREAM_NIGHTS.streams:
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
        cells = [*map(as_level, map(interval, final)), str(interval(final[1] - final[0]))]
        cells.append(", ".join(f"{100 * each.mean():.1f}" for each in after))
        yield f"| {stream} | {' | '.join(cells)} |"


def seed_of(row: Row) -> int:
    """The seed of a row."""
    return int(row["seed"])


def describe_tiers(rows: Sequence[Row]) -> Iterator[str]:
    """What each arm learnt and ended with, by rate, and what came nearest to winning."""
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
    for kind, results in of_kinds.items():
        found = list(matches(results))
        wins = [both[0].arm for both in found if all(each.wins for each in both)]
        nearest = max(found, key=lambda both: min(each.difference.mean for each in both))
        told = "; ".join(f"less {each.other} {each.difference}" for each in nearest)
        yield f"{kind}: {len(wins)} of {len(found)} win {wins}; nearest {nearest[0].arm}: {told}"
        yield f"{kind}: less control 1 at its end and rate {100 * beside_control(results):+.1f}"


def results_of(rows: Sequence[Row], kind: str) -> StreamResults:
    """Those of both orders of a kind of stream."""
    return StreamResults(rows, TIERS_OF[kind], "geography-base")


if __name__ == "__main__":
    print("\n".join(describe_nights(read_rows(HERE / "rows-4-nights.jsonl"))))
    print("\n".join(describe_tiers(read_rows(HERE / "rows-4-tiers.jsonl"))))
