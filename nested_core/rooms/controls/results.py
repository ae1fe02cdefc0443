"""What a control gives: a row of the table of checks, and warnings that gate.json keeps as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.gate.checks.judged import CheckedRun
from nested_core.records.verdict import CheckRow

LISTED_ROWS = 10  # of those that a warning is about


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
    lines: the rows that it is about, the most suspect first, of which LISTED_ROWS are kept.
    doubt: why only a person may promote the adapter, in a few words; None if it may be promoted.
    """

    kind: str
    figure: float | None
    words: str
    interval: tuple[float, float] | None = None
    lines: Sequence[SuspectLine] = ()
    doubt: str | None = None

    @classmethod
    def of_share(cls, kind: str, count: int, total: int, words: str, **more: Any) -> Self:
        """Return the warning that so many rows of all are odd; `more` has other fields."""
        return cls(kind, count / total, words, share_interval(count, total), **more)

    def to_json(self, control: str) -> dict[str, Any]:
        """Return the entry for gate.json. control: the key under `gate.controls`."""
        entry = {"control": control, **vars(self)}
        del entry["doubt"]
        listed = self.lines[:LISTED_ROWS]
        places = [{"file": x.file, "line": x.line, "figure": x.figure} for x in listed]
        return entry | {"lines": places}

    def list_texts(self) -> Iterator[dict[str, Any]]:
        """Yield the entries for suspect-rows.jsonl."""
        return ({"kind": self.kind, "row": x._asdict()} for x in self.lines[:LISTED_ROWS])


Told = Iterator[CheckRow | ControlWarning]


@dataclass(frozen=True)
class Control:
    """A control: its key under `gate.controls`, the name of its row, and what measures it.

    measure: yields rows for the table and warnings, of the run that is judged and its training
        rows.
    is_of_learning: whether it tells nothing of an adapter that has hardly learnt.
    """

    key: str
    name: str
    measure: Callable[[CheckedRun, TokenizedSplit], Told]
    is_of_learning: bool = False


class NotApplicableError(Exception):
    """Why a control has nothing to compare, in a few words."""


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, `count` of `total` above 0 (Wilson 1927)."""
    z, share = 1.959964, count / total
    width = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / width
    half = z / width * math.sqrt(share * (1 - share) / total + (z / total) ** 2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)
