"""The blocks `controls` and `control_figures` of gate.json in words: rows, notes and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from nested_core.errors import naming_damaged_file
from nested_core.records.run_status import Run
from nested_core.records.verdict import CheckRow, Verdict, VerdictBlock
from nested_core.report.page_blocks import PageBlocks
from nested_core.rooms.controls.results import CONTROLS_BLOCK, FIGURES_BLOCK, ToldRow
from nested_core.storage.untrusted_files import read_regular
from nested_core.text.document import Table

SHOWN_LINES = 3  # gate.json has all
_ROW_VALIDATOR = TypeAdapter(ToldRow)


def _list_rows(block: Any, verdict: Verdict) -> Iterator[CheckRow]:  # noqa: ARG001
    """Yield a row for each control that ran, of the block `control_figures`."""
    for row in verdict.blocks.get(FIGURES_BLOCK, ()):
        yield CheckRow(**row | {"name": f"control: {row['name']}"})


def _list_notes(block: Any, verdict: Verdict) -> Iterator[str]:  # noqa: ARG001
    """Yield a sentence for each warning, with its first lines."""
    for warning in block:
        lines = _list_lines(warning["lines"])
        yield f"warning: {warning['words']}{lines} (docs/controls.md#{warning['control']})"


def _list_lines(lines: Sequence[Any]) -> str:
    """Return the first rows that a warning is about: `: train.jsonl:5, train.jsonl:9`."""
    shown = [f"{line['file']}:{line['line']}" for line in lines[:SHOWN_LINES]]
    return f": {', '.join(shown)}" if shown else ""


def _tabulate_rows(run: Run, most: int) -> Iterator[Table]:
    """Yield a table of the rows that each warning of the verdict is about, at most so many."""
    warnings = [] if run.verdict is None else run.verdict.blocks.get(CONTROLS_BLOCK, ())
    file = run.folder.suspect_rows
    told = run.read(file, _read_rows) if warnings else None
    for warning in warnings:
        places = {(line["file"], line["line"]) for line in warning["lines"]}
        rows = [
            (f"{name}:{line}", text, given, figure)
            for kind, (name, line, text, figure, given) in told or ()
            if kind == warning["kind"] and (name, line) in places
        ]
        caption = f"Rows of the warning {warning['kind'].replace('_', ' ')}; all: {file.name}"
        columns = ("row", "its answer", "the adapter", "figure")
        yield from [Table(caption, columns, rows[:most])] if rows else []


def _read_rows(path: Path) -> list[ToldRow]:
    """Read suspect-rows.jsonl; DamagedError if a line has another form."""
    with naming_damaged_file(path):
        return [_ROW_VALIDATOR.validate_json(line) for line in read_regular(path).splitlines()]


SHOWN = VerdictBlock(CONTROLS_BLOCK, _list_rows, _list_notes)
ROWS = PageBlocks(of_rows=_tabulate_rows)
