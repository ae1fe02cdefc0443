"""The blocks `controls` and `control_figures` of gate.json in words: rows and notes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from nested_core.records.verdict import CheckRow, Verdict, VerdictBlock
from nested_core.rooms.controls.results import CONTROLS_BLOCK, FIGURES_BLOCK
from nested_core.text.foreign_text import escape

SHOWN_LINES = 3  # gate.json has all


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
    """Return the first rows that a warning is about: `: train.jsonl:5 ("text")`."""
    shown = []
    for line in lines[:SHOWN_LINES]:
        text = json.dumps(line["text"], ensure_ascii=False)
        if line["given"] is not None:
            text += f", the adapter: {json.dumps(line['given'], ensure_ascii=False)}"
        shown.append(f"{line['file']}:{line['line']} ({escape(text)})")
    return f": {'; '.join(shown)}" if shown else ""


SHOWN = VerdictBlock(CONTROLS_BLOCK, _list_rows, _list_notes)
