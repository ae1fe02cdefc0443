"""A document as a small tree of blocks, rendered as an HTML page, Markdown, or for a terminal.

Foreign text is displayed literally in each of them, and is markup in none.
"""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Literal

from nested_core.text import html_markup as h
from nested_core.text.foreign_text import escape, escape_markdown
from nested_core.text.svg_chart import ON_PAGE, STANDALONE, Chart, draw_chart
from nested_core.text.value_format import format_value

Tone = Literal["", "good", "bad", "warn", "note"]
MAX_PARAGRAPH, MAX_CELL = 2_000, 400  # characters of a page; a longer text is cut
MIN_WRAPPED = 60  # characters of a cell that gets a width of its own
MAX_HEAT_OPACITY = 0.55  # share of the colour behind the largest value: text on it stays legible
MAX_NUMBER_ROWS = 200  # of the table of a curve's numbers
CONTINUED = "…"  # begins a row of Markdown that continues the one above it


@dataclass(frozen=True)
class Text:
    """A paragraph; a headline is the sentence to read first."""

    text: str
    tone: Tone = ""
    is_headline: bool = False


@dataclass(frozen=True)
class Facts:
    """Names, each with a value or a `Cell`."""

    rows: Sequence[tuple[str, object]]


@dataclass(frozen=True)
class Code:
    """Text as in a file or a terminal, to be copied; a terminal leaves it out."""

    label: str
    text: str


@dataclass(frozen=True)
class Cell:
    """A table value with additional markup.

    mark: a word before the value.
    tone: the colour of the mark, or of the value without a mark.
    heat: from 0 to 1, how strongly the cell is coloured.
    path: where the cell links to on Prefect's server.
    """

    value: object
    tone: Tone = ""
    mark: str = ""
    heat: float | None = None
    path: str | None = None


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows; a cell is a value or a `Cell`.

    max_width: the most characters of a cell in Markdown; a longer text continues in further rows,
        which begin with CONTINUED.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    max_width: int = 48


@dataclass(frozen=True)
class Figures:
    """Figures side by side; each is one chart, or several charts of the same numbers."""

    figures: Sequence[Sequence[Chart]]


@dataclass(frozen=True)
class Details:
    """Blocks that a reader of a page can open; a terminal leaves them out."""

    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; `name` is the section's identifier on a page."""

    heading: str
    blocks: Sequence[Block]
    name: str = ""


Block = Text | Facts | Code | Table | Figures | Details | Section


@dataclass(frozen=True)
class Document:
    """A title, blocks, and small lines above and below them."""

    title: str
    blocks: Sequence[Block]
    above: str = ""
    below: str = ""

    def __str__(self) -> str:
        """Render the document as Markdown."""
        lines = chain.from_iterable(map(to_markdown, self.blocks))
        return "\n".join([f"# {escape_markdown(self.title)}", "", *lines]).rstrip("\n")

    def to_html(self) -> str:
        """Render a whole page: one file that runs nothing and fetches nothing."""
        note = h.paragraph(self.above, class_="note")
        header = h.element("header", h.element("h1", self.title), note)
        footer = h.element("footer", h.paragraph(self.below, class_="note"))
        return h.page(self.title, header, h.element("main", *map(to_html, self.blocks)), footer)

    def to_fragment(self) -> str:
        """Render the blocks for a notebook's cell."""
        return h.notebook_fragment(*map(to_html, self.blocks))


def to_html(block: Block, *, is_inner: bool = False) -> h.Html:
    """Render a block as HTML; with `is_inner`, as part of a section, with smaller headings."""
    match block:
        case Text(text, tone, is_headline):
            classes = f"verdict {tone}".strip() if is_headline else tone
            return h.paragraph(h.cut(text, MAX_PARAGRAPH), class_=classes)
        case Facts(rows):
            pairs = ((h.element("dt", name), h.element("dd", _html_value(v))) for name, v in rows)
            return h.element("dl", *(h.element("div", *pair) for pair in pairs))
        case Code(label, text):
            return h.preformatted(label, text)
        case Table():
            return _html_table(block)
        case Figures(figures):
            return h.element("div", *map(_html_figure, figures), class_="charts")
        case Details(summary, blocks):
            return h.collapsed(summary, h.join(map(to_html, blocks)))
        case Section(heading, blocks, name):
            inner = [to_html(each, is_inner=True) for each in blocks]
            if is_inner:
                return h.join((h.element("h3", heading), *inner))
            return h.section(name, heading, *inner)


def _html_table(table: Table) -> h.Html:
    """Render a table, leaving out end tags that HTML allows to omit."""
    heads = (f"<th scope=col>{h.escaped_html(name)}" if name else "<td>" for name in table.columns)
    lines = []
    for first, *others in table.rows:
        cells = "".join(map(_html_cell, others))
        lines.append(f"<tr><th scope=row>{_html_value(first)}{cells}\n")
    caption = h.element("caption", h.element("span", table.caption))
    has_heat = any(getattr(one, "heat", None) is not None for row in table.rows[:1] for one in row)
    start = '<table class="heat">' if has_heat else "<table>"
    body = h.Html(f"{start}{caption}<thead><tr>{''.join(heads)}<tbody>{''.join(lines)}</table>")
    label = table.caption  # the element scrolls sideways, with the keyboard too
    return h.element("div", body, class_="scroll", role="group", tabindex="0", aria_label=label)


def _html_cell(cell: object) -> str:
    """Render a table cell that is not the first of its row."""
    if not isinstance(cell, Cell):
        is_number = isinstance(cell, int | float) and not isinstance(cell, bool)
        return f"<td{' class=n' if is_number else ''}>{_html_value(cell)}"
    if cell.heat is None:
        return f"<td>{_html_value(cell)}"
    tone = f' class="{cell.tone}"' if cell.tone else ""
    style = f"background:rgba(var(--heat),{MAX_HEAT_OPACITY * cell.heat:.2f})"
    return f'<td{tone} style="{style}">{_html_value(replace(cell, tone="", heat=None))}'


def _html_value(value: object) -> h.Html:
    """Render a value; a long text, or one of several lines, keeps its lines and gets a width."""
    if isinstance(value, Cell):
        shown = _html_value(value.value)
        if value.mark:
            return h.join((h.element("small", value.mark, class_=value.tone), " ", shown))
        return h.element("span", shown, class_=value.tone) if value.tone else shown
    if isinstance(value, str) and (len(value) > MIN_WRAPPED or "\n" in value):
        return h.element("span", h.cut(value, MAX_CELL), class_="text")
    return h.escaped_html(value)


def _html_figure(charts: Sequence[Chart]) -> h.Html:
    """Render charts of the same numbers with a legend and a table; "" without a finite point."""
    charts = [_without_empty_curves(chart) for chart in charts]
    curves = charts[0].curves
    if not curves:
        return h.Html("")
    colours = map(ON_PAGE.curve_colour, range(len(curves) if len(curves) > 1 else 0))
    keys = [
        h.join((h.Html(f'<span class="key" style="background:{colour}"></span>'), curve.name))
        for colour, curve in zip(colours, curves, strict=False)
    ]
    caption = h.element("figcaption", charts[0].title, *keys)
    pictures = h.element("div", *map(draw_chart, charts), class_="charts")
    numbers = h.collapsed("The numbers", _html_table(_tabulate(charts)))
    return h.element("figure", caption, pictures, numbers, class_="wide" if len(charts) > 1 else "")


def _without_empty_curves(chart: Chart) -> Chart:
    """Return the chart without curves that have no finite value."""
    curves = [curve for curve in chart.curves if any(p.y is not None for p in curve.points)]
    return replace(chart, curves=curves)


def _tabulate(charts: Sequence[Chart]) -> Table:
    """Build the table of a chart's numbers: one row for each x of the first chart.

    charts: charts of the same curves over different x; the x of the others are further columns. If
        there are more than MAX_NUMBER_ROWS rows, evenly spaced ones are shown, at which all curves
        have a value.
    """
    chart, *others = charts
    y_by_x = [{point.x: point.y for point in curve.points} for curve in chart.curves]
    other_x: list[dict[float, float | None]] = [
        {
            p.x: q.x
            for one, two in zip(chart.curves, other.curves, strict=True)
            for p, q in zip(one.points, two.points, strict=True)
        }
        for other in others
    ]
    x_values = sorted({x for curve in y_by_x for x in curve})
    total = len(x_values)
    if total > MAX_NUMBER_ROWS:
        complete = [x for x in x_values if all(x in curve for curve in y_by_x)]
        x_values = complete if len(complete) > 1 else x_values
        x_values = [*x_values[: -1 : -(-len(x_values) // MAX_NUMBER_ROWS)], x_values[-1]]
    rows = [
        (int(x) if float(x).is_integer() else x, *(c.get(x, "") for c in (*other_x, *y_by_x)))
        for x in x_values
    ]
    caption = f"{chart.title}: {chart.y} by {chart.x}"
    if len(x_values) < total:
        caption += f", {len(x_values)} of {total:,}; all: metrics.jsonl"
    names = [chart.x, *(other.x for other in others), *(curve.name for curve in chart.curves)]
    return Table(caption, names, rows)


def to_markdown(block: Block, level: int = 2) -> Iterator[str]:
    """Yield a block's lines of Markdown, with an empty line at its end."""
    match block:
        case Text(text):
            yield from (escape_markdown(text), "")
        case Facts(rows):
            yield from (f"- **{escape_markdown(n)}**: {_markdown_cell(v)}" for n, v in rows)
            yield ""
        case Code(_, text):
            yield from (*(f"    {escape(line)}" for line in text.split("\n")), "")
        case Table():
            yield from _markdown_table(block)
        case Figures(figures):
            for charts in figures:
                yield from _markdown_picture(charts[0])
        case Details(heading, blocks) | Section(heading, blocks):
            yield from (f"{'#' * level} {escape_markdown(heading)}", "")
            for inner in blocks:
                yield from to_markdown(inner, level + 1)


def _markdown_table(table: Table) -> Iterator[str]:
    """Yield a table's lines of Markdown."""
    if table.caption:
        yield from (escape_markdown(table.caption), "")
    yield _markdown_row(table.columns)
    yield "|" + "---|" * len(table.columns)
    for row in table.rows:
        lines = [_wrap(cell, table.max_width) for cell in row]
        lines[0] += [CONTINUED] * (max(map(len, lines)) - len(lines[0]))
        yield from map(_markdown_row, zip_longest(*lines, fillvalue=""))
    yield ""


def _wrap(cell: object, width: int) -> list[object]:
    """Split a cell into lines, each for a row of its own, as Prefect's UI cuts wide cells."""
    if isinstance(cell, Cell) and cell.path is not None:
        return [cell]
    text = h.cut(format_value(_plain(cell)), MAX_CELL)
    lines = textwrap.wrap(  # a digest stays whole
        text, width, break_long_words=False, break_on_hyphens=False
    )
    return [*lines] or [""]


def _markdown_row(cells: Iterable[object]) -> str:
    """Render a table row as a line of Markdown."""
    return f"| {' | '.join(map(_markdown_cell, cells))} |"


def _markdown_cell(cell: object) -> str:
    """Render a cell as Markdown, with its link if it has a path."""
    if not isinstance(cell, Cell):
        return escape_markdown(format_value(cell))
    shown = escape_markdown(format_value(_plain(cell)))
    return shown if cell.path is None else f"[{shown}]({cell.path})"


def _markdown_picture(chart: Chart) -> Iterator[str]:
    """Yield the lines of a chart as an image in the page, as a data URI.

    Both of Prefect 3.8's UIs display a data URI; neither displays SVG within Markdown.
    """
    drawn = draw_chart(chart, STANDALONE)
    if drawn:
        data = base64.b64encode(drawn.encode()).decode()
        yield from (f"![{escape_markdown(chart.title)}](data:image/svg+xml;base64,{data})", "")


def to_terminal(block: Block) -> Iterator[str | Table]:
    """Yield a block's lines, and tables that a console lays out; the printing code escapes them."""
    match block:
        case Text(text):
            yield text
        case Facts(rows):
            yield from (f"{name}: {format_value(_plain(value))}" for name, value in rows)
        case Table(caption, columns, rows):
            yield Table(caption, columns, [[_plain(cell) for cell in row] for row in rows])
        case Section(heading, blocks):
            yield heading
            for inner in blocks:
                yield from to_terminal(inner)
        case Code() | Details() | Figures():
            pass


def _plain(cell: object) -> object:
    """Return a cell's value, with its mark as text; any other value as it is."""
    if not isinstance(cell, Cell):
        return cell
    return f"{cell.mark} {format_value(cell.value)}" if cell.mark else cell.value
