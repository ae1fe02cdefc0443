"""The artifacts of a flow run: pages, tables and links, in which text of others is no markup.

Prefect's pages show artifacts as markdown, cells of tables too. Everything that comes in here as
text is escaped; the markup is what these functions add.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefect.artifacts import (  # noqa: TID251
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from nested_core.foreign_text import escape, escape_markdown


class MarkdownPage:
    """A page of markdown, put together from text: headings, paragraphs, points and tables."""

    def __init__(self, heading: str) -> None:
        self._lines = [f"# {escape_markdown(heading)}", ""]

    def add_paragraph(self, text: str) -> None:
        """Add a paragraph of one line."""
        self._lines += [escape_markdown(text), ""]

    def add_points(self, points: Iterable[tuple[str, str]]) -> None:
        """Add a list of points: a code, and what there is to say of it."""
        lines = [f"- `{escape(code).replace('`', '')}`: {escape_markdown(t)}" for code, t in points]
        self._lines += [*lines, ""]

    def add_table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a table, a row for each of `rows`."""
        self._lines += [_table_line(columns), "|" + "---|" * len(columns)]
        self._lines += [*map(_table_line, rows), ""]

    def __str__(self) -> str:
        return "\n".join(self._lines).rstrip("\n")


def _table_line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(escape_markdown(str(cell)) for cell in cells)} |"


def publish_page(key: str, page: MarkdownPage) -> None:
    """Put a page beside the flow run."""
    create_markdown_artifact(key=key, markdown=str(page))


def publish_table(key: str, rows: Sequence[Mapping[str, Any]], description: str = "") -> None:
    """Put a table beside the flow run; numbers, true, false and null stay what they are."""
    table = [
        {escape_markdown(name): _table_cell(value) for name, value in row.items()} for row in rows
    ]
    create_table_artifact(key=key, table=table, description=escape_markdown(description) or None)


def _table_cell(value: Any) -> Any:
    is_plain = value is None or isinstance(value, bool | int | float)
    return value if is_plain else escape_markdown(str(value))


def publish_link(key: str, address: str, text: str, description: str) -> None:
    """Put a link beside the flow run; `address` is a URI, in which what is special is encoded."""
    create_link_artifact(
        key=key,
        link=address,
        link_text=escape_markdown(text),
        description=escape_markdown(description),
    )
