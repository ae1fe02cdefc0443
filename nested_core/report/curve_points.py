"""Curves with fewer points, in which every peak is still seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_POINTS = 500


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a curve; `y` is None where the value was not finite."""

    x: float
    y: float | None


def decimate(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` of the points: the first and the last, and of each stretch its extremes.

    Of each of (limit - 2) / 2 stretches of equal length the lowest and the highest point are kept,
    in their order, so that a single spike among 10,000 values stays. A stretch without a finite
    value keeps one point, the gap.
    """
    if len(points) <= limit:
        return list(points)
    inner = points[1:-1]
    stretches = (limit - 2) // 2
    kept = [points[0]]
    for number in range(stretches):
        first = number * len(inner) // stretches
        stretch = inner[first : (number + 1) * len(inner) // stretches]
        finite = [(point.y, i) for i, point in enumerate(stretch) if point.y is not None]
        places = {min(finite)[1], max(finite)[1]} if finite else {0}
        kept += [stretch[place] for place in sorted(places)]
    return [*kept, points[-1]]
