"""Two answers side by side as they come; where there is no terminal, one line each at their end."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.terminal.console import WIDTH_WITHOUT_TERMINAL, output_console, print_line
from nested_core.text.foreign_text import escape_but_keep_newlines

COLUMN_NAMES = ("base", "adapter")


def show_answers(pieces: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Show the pieces of either column's text as they come; return the whole texts."""
    texts = dict.fromkeys(COLUMN_NAMES, "")
    console = output_console(WIDTH_WITHOUT_TERMINAL)
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        for column, piece in pieces:
            texts[column] += piece
        for column in COLUMN_NAMES:
            print_line(f"{f'{column}:':<9}{texts[column].strip()}")
        return texts
    with Live(lay_out(texts), console=console, auto_refresh=False) as live:
        for column, piece in pieces:
            texts[column] += piece
            live.update(lay_out(texts), refresh=True)
    return texts


def lay_out(texts: Mapping[str, str]) -> Table:
    """A column a text; what a model wrote is escaped, but for its line ends."""
    table = Table(expand=True)
    for column in COLUMN_NAMES:
        table.add_column(column, ratio=1, overflow="fold")
    table.add_row(
        *(Text(escape_but_keep_newlines(texts[column].strip())) for column in COLUMN_NAMES)
    )
    return table
