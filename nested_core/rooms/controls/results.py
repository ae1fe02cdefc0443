"""What a control gives: rows of the table of checks, and warnings, which gate.json keeps as data.

gate.json has the blocks `controls`, the warnings, and `control_figures`, a row for each control
that ran. Texts of rows are in the run alone, in suspect-rows.jsonl.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import TypeAdapter

from nested_core.errors import naming_damaged_file
from nested_core.gate.checks.judged import CheckedRun
from nested_core.records.run_status import Run
from nested_core.records.verdict import CheckRow, Verdict, VerdictBlock
from nested_core.report.page_blocks import PageBlocks
from nested_core.storage.atomic import canonical_json
from nested_core.storage.untrusted_files import read_regular
from nested_core.text.document import Table

CONTROLS_BLOCK, FIGURES_BLOCK = "controls", "control_figures"
DOUBTS = {"form_alone": "what it answers does not depend on the question"}  # a person promotes it
LISTED_ROWS = 10  # of those that a warning is about
SHOWN_LINES = 3  # of them, in the sentence of the warning
WORDS = tomllib.loads(Path(__file__).with_name("warnings.toml").read_text("utf-8"))


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


Lines = Sequence[SuspectLine]


class ToldRow(NamedTuple):
    """A line of suspect-rows.jsonl: the kind of a warning, and a row that it is about."""

    kind: str
    row: SuspectLine


_ROW_VALIDATOR = TypeAdapter(ToldRow)


@dataclass(frozen=True)
class ControlWarning:
    """An entry of the list `controls` in gate.json, which adds the key under `gate.controls`.

    kind: what was noticed, as one word.
    figure, interval: the figure that the warning rests on, and its 95 % interval if it has one.
    words: a sentence for a person, without texts of rows.
    lines: the rows that it is about, the most suspect first, of which LISTED_ROWS are kept.
    """

    kind: str
    figure: float | None
    words: str
    interval: tuple[float, float] | None = None
    lines: Lines = ()

    @classmethod
    def told(cls, kind: str, figure: float | None, lines: Lines = (), **named: Any) -> Self:
        """Return the warning with its words of warnings.toml; these name the figures in `named`."""
        words = WORDS[kind].format(figure=figure, **named)
        return cls(kind, figure, words, named.get("interval"), lines)

    @classmethod
    def of_share(cls, kind: str, count: int, total: int, lines: Lines = (), **named: Any) -> Self:
        """Return the warning that so many rows of all are odd."""
        named |= {"count": count, "total": total, "interval": share_interval(count, total)}
        return cls.told(kind, count / total, lines, **named)

    def to_json(self, control: str) -> dict[str, Any]:
        """Return the entry for gate.json. control: the key under `gate.controls`."""
        listed = self.lines[:LISTED_ROWS]
        places = [{"file": x.file, "line": x.line, "figure": x.figure} for x in listed]
        return {"control": control, **vars(self), "lines": places}

    def list_texts(self) -> Iterator[dict[str, Any]]:
        """Yield the entries for suspect-rows.jsonl."""
        return ({"kind": self.kind, "row": x._asdict()} for x in self.lines[:LISTED_ROWS])


Row = CheckRow | ControlWarning
Told = Iterator[Row]


class NotApplicableError(Exception):
    """Why a control has nothing to compare, in a few words."""


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, `count` of `total` above 0 (Wilson 1927)."""
    z, share = 1.959964, count / total
    width = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / width
    half = z / width * math.sqrt(share * (1 - share) / total + (z / total) ** 2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def add_to_verdict(judged: CheckedRun, told: Sequence[tuple[str, Row]]) -> None:
    """Add what controls told to the verdict, and the texts of rows to the files beside gate.json.

    told: rows and warnings, each with the key of its control.
    """
    warnings = [(key, one) for key, one in told if isinstance(one, ControlWarning)]
    rows = [asdict(one) for _, one in told if isinstance(one, CheckRow)]
    blocks = {CONTROLS_BLOCK: [one.to_json(key) for key, one in warnings], FIGURES_BLOCK: rows}
    texts = [canonical_json(text) for _, one in warnings for text in one.list_texts()]
    if texts:
        judged.written_files[judged.run.suspect_rows.name] = b"".join(x + b"\n" for x in texts)
    doubt = next((DOUBTS[one.kind] for _, one in warnings if one.kind in DOUBTS), None)
    judged.verdict = replace(judged.verdict, doubt=doubt, blocks=judged.verdict.blocks | blocks)


def _list_rows(block: Any, verdict: Verdict) -> Iterator[CheckRow]:  # noqa: ARG001
    """Yield a row for each control that ran, of the block `control_figures`."""
    for row in verdict.blocks.get(FIGURES_BLOCK, ()):
        yield CheckRow(**row | {"name": f"control: {row['name']}"})


def _list_notes(block: Any, verdict: Verdict) -> Iterator[str]:  # noqa: ARG001
    """Yield a sentence for each warning, with its first lines: `: train.jsonl:5, train.jsonl:9`."""
    for warning in block:
        shown = [f"{line['file']}:{line['line']}" for line in warning["lines"][:SHOWN_LINES]]
        lines = f": {', '.join(shown)}" if shown else ""
        yield f"warning: {warning['words']}{lines} (docs/controls.md#{warning['control']})"


def _tabulate_rows(run: Run, most: int) -> Iterator[Table]:
    """Yield a table of the rows that each warning of the verdict is about, at most so many."""
    file = run.folder.suspect_rows
    told = None if run.verdict is None else run.read(file, _read_rows)
    for kind, rows in groupby(told or (), attrgetter("kind")):
        cells = [(f"{row.file}:{row.line}", row.text, row.given, row.figure) for _, row in rows]
        caption = f"Rows of the warning {kind.replace('_', ' ')}; more: {file.name}"
        yield Table(caption, ("row", "its answer", "the adapter", "figure"), cells[:most])


def _read_rows(path: Path) -> list[ToldRow]:
    """Read suspect-rows.jsonl; DamagedError if a line has another form."""
    with naming_damaged_file(path):
        return [_ROW_VALIDATOR.validate_json(line) for line in read_regular(path).splitlines()]


SHOWN = VerdictBlock(CONTROLS_BLOCK, _list_rows, _list_notes)
ROWS = PageBlocks(of_rows=_tabulate_rows)
