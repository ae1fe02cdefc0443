"""A page of markdown for Prefect's UI, in which text from data and configuration is no markup."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nested_core.text.foreign_text import escape, escape_markdown
from nested_core.text.value_format import format_value


@dataclass(frozen=True)
class Link:
    """Text that leads to another page of the same server."""

    text: str
    path: str

    def __str__(self) -> str:
        return f"[{escape_markdown(self.text)}]({self.path})"


class MarkdownPage:
    """A page put together from plain text: headings, paragraphs, facts, tables and pictures."""

    def __init__(self, heading: str) -> None:
        self._lines = [f"# {escape_markdown(heading)}", ""]

    def add_heading(self, text: str) -> None:
        """Add a heading of the second level."""
        self._lines += [f"## {escape_markdown(text)}", ""]

    def add_paragraph(self, text: str) -> None:
        """Add a paragraph of one line."""
        self._lines += [escape_markdown(text), ""]

    def add_bullets(self, points: Iterable[tuple[str, str]]) -> None:
        """Add a list of points: a code, and what there is to say of it."""
        lines = [f"- `{escape(code).replace('`', '')}`: {escape_markdown(t)}" for code, t in points]
        self._lines += [*lines, ""]

    def add_facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """Add a list of facts, a line each: what it is about in bold, and the fact."""
        lines = [f"- **{escape_markdown(name)}**: {escape_markdown(fact)}" for name, fact in facts]
        self._lines += [*lines, ""]

    def add_code(self, *lines: str) -> None:
        """Add a block of lines that are shown in the letters of a terminal, to be copied."""
        self._lines += [*(f"    {escape(line)}" for line in lines), ""]

    def add_table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a table, a row for each of `rows`; numbers have 4 significant digits."""
        self._lines += [_table_line(columns), "|" + "---|" * len(columns)]
        self._lines += [*map(_table_line, rows), ""]

    def add_links(self, links: Iterable[tuple[str, str]]) -> None:
        """Add a line of links: the text of each, and where on this server it leads."""
        self._lines += [" | ".join(str(Link(text, path)) for text, path in links), ""]

    def add_picture(self, svg: str, alternative: str) -> None:
        """Add a drawing, within the page: no browser asks the network for it.

        Of Prefect 3.8's two UIs both show it as a data URI; neither shows SVG among the markdown.
        """
        data = base64.b64encode(svg.encode()).decode()
        self._lines += [f"![{escape_markdown(alternative)}](data:image/svg+xml;base64,{data})", ""]

    def __str__(self) -> str:
        return "\n".join(self._lines).rstrip("\n")


def _table_line(cells: Sequence[object]) -> str:
    shown = (str(c) if isinstance(c, Link) else escape_markdown(format_value(c)) for c in cells)
    return f"| {' | '.join(shown)} |"
