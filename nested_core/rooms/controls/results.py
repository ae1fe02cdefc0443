"""What a control gives: a row of the table of checks, and warnings that gate.json keeps as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.gate.checks.judged import CheckedRun
from nested_core.records.verdict import CheckRow

Interval = tuple[float, float]


class SuspectLine(NamedTuple):
    """A row of the data set that a warning is about.

    gate.json has file, line and figure; the texts are in the run alone, in suspect-rows.jsonl.

    file, line: where it is, lines counted from 1. text: the start of its answer.
    figure: the row's figure, such as its loss in nats.
    given: what the adapter answers, None if it was not asked.
    """

    file: str
    line: int
    text: str
    figure: float | None = None
    given: str | None = None


class ToldRow(NamedTuple):
    """A line of suspect-rows.jsonl: the kind of a warning, and a row that it is about."""

    kind: str
    row: SuspectLine


@dataclass(frozen=True)
class ControlWarning:
    """An entry of the list `controls` in gate.json, which adds the key under `gate.controls`.

    kind: what was noticed, as one word.
    figure, interval: the figure that the warning rests on, and its 95 % interval if it has one.
    words: a sentence for a person, without texts of rows.
    lines: the rows that it is about, the most suspect first.
    doubt: why only a person may promote the adapter, in a few words; None if it may be promoted.
    """

    kind: str
    figure: float | None
    words: str
    interval: Interval | None = None
    lines: Sequence[SuspectLine] = ()
    doubt: str | None = None

    def to_json(self, control: str) -> dict[str, Any]:
        """Return the entry for gate.json. control: the key under `gate.controls`."""
        entry = {"control": control, **vars(self)}
        del entry["doubt"]
        places = [{"file": x.file, "line": x.line, "figure": x.figure} for x in self.lines]
        return entry | {"lines": places}


@dataclass(frozen=True)
class Result:
    """The rows of a control in the table of checks, and its warnings."""

    rows: list[CheckRow]
    warnings: list[ControlWarning] = field(default_factory=list)

    def warn(self, kind: str, figure: float | None, words: str, **more: Any) -> None:
        """Add a warning; `more` has other fields of a ControlWarning."""
        self.warnings.append(ControlWarning(kind, figure, words, **more))


@dataclass(frozen=True)
class Control:
    """A control: its key under `gate.controls`, the name of its row, and what measures it.

    measure: compares, of the run that is judged, with its training rows.
    is_of_learning: whether it tells nothing of an adapter that has hardly learnt.
    """

    key: str
    name: str
    measure: Callable[[CheckedRun, TokenizedSplit], Result]
    is_of_learning: bool = False


class NotApplicableError(Exception):
    """Why a control has nothing to compare, in a few words."""


def share_interval(count: int, total: int) -> Interval:
    """Return Wilson's 95 % interval of a share, `count` of `total` above 0 (Wilson 1927)."""
    z, share = 1.959964, count / total
    width = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / width
    half = z / width * math.sqrt(share * (1 - share) / total + (z / total) ** 2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)
