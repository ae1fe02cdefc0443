"""What a control gives: a row of the table of checks, and warnings that gate.json keeps as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

CONTROLS_BLOCK = "controls"  # of gate.json: the warnings
FIGURES_BLOCK = "control_figures"  # of gate.json: a row for each control that ran
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class SuspectLine:
    """A row of the data set that a warning is about.

    file, line: where it is, lines counted from 1.
    figure: the row's figure, such as its loss in nats.
    text: the start of its answer; given: what the adapter answers, None if it was not asked.
    """

    file: str
    line: int
    figure: float | None = None
    text: str | None = None
    given: str | None = None


@dataclass(frozen=True, kw_only=True)
class ControlWarning:
    """An entry of the list `controls` in gate.json.

    control: the key under `gate.controls`. kind: what was noticed, as one word.
    figure, interval: the figure that the warning rests on, and its 95 % interval if it has one.
    words: a sentence for a person.
    lines: the rows that it is about, the most suspect first.
    doubt: why only a person may promote the adapter, in a few words; None if it may be promoted.
    """

    control: str
    kind: str
    figure: float | None
    words: str
    interval: Interval | None = None
    lines: tuple[SuspectLine, ...] = ()
    doubt: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the entry for gate.json."""
        return {name: value for name, value in asdict(self).items() if name != "doubt"}


@dataclass(frozen=True, kw_only=True)
class ControlFigure:
    """A row of the table: what a control measured, or why it could not.

    name: of the row. before, after: what is compared, as text. result: the conclusion in words.
    """

    control: str
    name: str
    result: str
    before: str | None = None
    after: str | None = None
    difference: str | None = None
    bound: str | None = None


@dataclass(frozen=True, kw_only=True)
class ControlResult:
    """The rows and warnings of one control."""

    figures: Sequence[ControlFigure] = ()
    warnings: Sequence[ControlWarning] = field(default=())


def not_applicable(control: str, name: str, reason: str) -> ControlResult:
    """Return the result of a control that does not apply, with the reason as its conclusion."""
    row = ControlFigure(control=control, name=name, result=f"not applicable: {reason}")
    return ControlResult(figures=(row,))


def share_interval(count: int, total: int) -> Interval:
    """Return Wilson's 95 % interval of a share, `count` of `total` above 0 (Wilson 1927)."""
    z, share = 1.959964, count / total
    width = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / width
    half = z / width * math.sqrt(share * (1 - share) / total + (z / total) ** 2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)
