"""The blocks `controls` and `control_figures` of gate.json in words: rows, notes and tables."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from nested_core.errors import naming_damaged_file
from nested_core.records.run_status import Run
from nested_core.records.verdict import CheckRow, Verdict, VerdictBlock
from nested_core.report.page_blocks import PageBlocks
from nested_core.rooms.controls.results import ToldRow
from nested_core.storage.untrusted_files import read_regular
from nested_core.text.document import Table

CONTROLS_BLOCK = "controls"  # the warnings
FIGURES_BLOCK = "control_figures"  # a row for each control that ran
SHOWN_LINES = 3  # gate.json has more
_ROW_VALIDATOR = TypeAdapter(ToldRow)


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
