"""What a person sees: progress, tables, and one paragraph for an error.

Progress goes to standard error; without a terminal it is a line now and then. All that any command
prints goes through here: text of data, adapters and file names is escaped, and is never markup.
"""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console  # noqa: TID251
from rich.table import Column, Table
from rich.text import Text

from nested_core.storage.atomic import finite_or_none
from nested_core.text.foreign_text import escape, escape_but_keep_newlines
from nested_core.text.value_format import format_value

if TYPE_CHECKING:
    from nested_core.optim.tier_counters import TierStats
    from nested_core.text.document import Block

SECONDS_BETWEEN_LINES = 2.0
POLL_SECONDS = 0.25
SECONDS_BEFORE_PROGRESS = 2.0
SHOW_CURSOR = b"\x1b[?25h"
WIDTH_WITHOUT_TERMINAL = 120
_COMMAND = re.compile("`[^`]+`")
_COMMAND_ALONE = re.compile(r"^(\s*)`([^`]+)`[.,;:]?$")
CELL_BORDER = 3  # columns of a terminal: a line and a space on both sides

errors = Console(stderr=True, highlight=False, markup=False, emoji=False)


def can_redraw() -> bool:
    """Whether what stands on standard error can be drawn over: it is a terminal, and no dumb one.

    FORCE_COLOR makes rich take a pipe for a terminal, which it is not.
    """
    is_tty = sys.__stderr__ is not None and sys.__stderr__.isatty()
    return is_tty and errors.is_terminal and not errors.is_dumb_terminal


def show_cursor() -> None:
    """Bring back the cursor, which a live view hides, from where nothing else can be done."""
    if can_redraw():
        os.write(sys.__stderr__.fileno(), SHOW_CURSOR)  # type: ignore[union-attr]  # it is a tty


class ProgressLine:
    """For work in known amounts: a line that is rewritten, or without a terminal now and then one.

    Nothing is shown of work that takes less than SECONDS_BEFORE_PROGRESS.
    """

    def __init__(self) -> None:
        self._began = self._called_at = time.monotonic()
        self._shown_at = 0.0
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of the work `what` are done; `total` is 1 or more.

        Another `what` is other work, which has begun when the last call for the work before ended.
        The end of the work is shown if an earlier part of it was.
        """
        now = time.monotonic()
        if what != self._what:
            self._began = self._called_at
            self._what = what
        self._called_at = now
        pause = POLL_SECONDS if can_redraw() else SECONDS_BETWEEN_LINES
        is_due = now - self._shown_at >= pause or (done == total and self._shown_at > self._began)
        if now - self._began < SECONDS_BEFORE_PROGRESS or not is_due:
            return
        self._shown_at = now
        text = f"{what}: {done / total:.0%}"
        if can_redraw():  # rich would leave out the carriage return
            errors.file.write(f"\r{escape(text):<40}{chr(10) if done == total else ''}")
            errors.file.flush()
        else:
            errors.print(text, soft_wrap=True)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = ""
) -> None:
    """A table on standard output, as wide as the terminal; else COLUMNS or 120 columns."""
    console = output_console(WIDTH_WITHOUT_TERMINAL)
    names = [escape(name) for name in columns]
    cells = [[escape(format_value(cell)) for cell in row] for row in rows]
    widths = _fit_columns([names, *cells], console.width - CELL_BORDER * len(names) - 1)
    headers = [
        Column(Text(name), overflow="fold", width=width)
        for name, width in zip(names, widths, strict=True)
    ]
    shown = Text(escape(title)) if title else None
    table = Table(*headers, title=shown, title_justify="left", show_header=any(names))
    for row_cells in cells:
        table.add_row(*map(Text, row_cells))
    console.print(table)


def print_blocks(*blocks: Block) -> None:
    """Blocks of a document on standard output: its lines, and its tables as wide as a terminal."""
    from nested_core.text.document import to_terminal

    for block in blocks:
        for part in to_terminal(block):
            if isinstance(part, str):
                print_line(part)
            else:
                print_table(part.columns, part.rows, title=part.caption)


def _fit_columns(rows: Sequence[Sequence[str]], available: int) -> list[int]:
    """The width of each column in characters, so that cells are broken between words.

    Where not even the longest words fit beside each other, those of the widest columns are broken.
    """
    columns = list(zip(*rows, strict=True))
    whole = [max(max(map(cell_len, cell.split("\n"))) for cell in column) for column in columns]
    widths = [max(cell_len(word) for cell in c for word in ["", *cell.split()]) for c in columns]
    while sum(widths) > available and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    for _ in range(min(available, sum(whole)) - sum(widths)):
        lines = [wanted / max(width, 1) for wanted, width in zip(whole, widths, strict=True)]
        widths[lines.index(max(lines))] += 1
    return widths


def output_console(width: int) -> Console:
    """A console for standard output, without markup.

    Where it is no terminal it has COLUMNS, as rich reads it, or without that `width`.
    """
    columns = os.environ.get("COLUMNS", "")
    is_given = columns.isdecimal() and int(columns) > 0
    width_or_none = None if sys.stdout.isatty() or is_given else width
    return Console(highlight=False, markup=False, emoji=False, width=width_or_none)


def describe_tiers(stats: Sequence[TierStats]) -> str:
    """What each tier holds and how often it is updated, on one line; no tiers where all is one."""
    if [s.frequency for s in stats] == [1]:
        return f"training {stats[0].tensors} tensors, {stats[0].parameters:,} parameters"
    return "; ".join(
        f"tier {s.tier} (every {'step' if s.frequency == 1 else f'{s.frequency} steps'}): "
        f"{s.tensors} tensors, {s.parameters:,} parameters"
        for s in stats
    )


def print_json(document: object) -> None:
    """Exactly one JSON document on standard output: ASCII, and null for what is not finite."""
    if sys.__stdout__ is not None:
        text = json.dumps(finite_or_none(document), indent=2, default=str, allow_nan=False)
        print(text, file=sys.__stdout__)  # noqa: T201


def print_line(text: str) -> None:
    """A line of a command's result on standard output; in a terminal it is broken between words."""
    columns = output_console(WIDTH_WITHOUT_TERMINAL).width if sys.stdout.isatty() else None
    for line in _wrap(escape(text), columns):
        print(line)  # noqa: T201


def print_page(text: str) -> None:
    """A document of several lines on standard output, as it would stand in a file."""
    print(escape_but_keep_newlines(text.rstrip("\n")))  # noqa: T201


def print_progress(*lines: str) -> None:
    """A line of progress, or the lines of a paragraph, on standard error; wrapped in a terminal."""
    columns = errors.width if can_redraw() else None
    for line in lines:
        for part in _wrap(escape(line), columns):
            errors.print(Text(part), soft_wrap=True)


def _wrap(line: str, columns: int | None) -> list[str]:
    """The line in parts of so many columns; a longer word, such as a path, stays whole.

    A command between backquotes stays whole too, so that it can be copied: alone in a part it
    stands without them. What follows the first part is indented below it. None: the line as it is.
    """
    if columns is None or len(line) <= columns:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    kept = _COMMAND.sub(lambda found: found[0].replace(" ", "\0"), line)
    parts = textwrap.wrap(
        kept, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [_COMMAND_ALONE.sub(r"\1\2", part).replace("\0", " ") for part in parts]
