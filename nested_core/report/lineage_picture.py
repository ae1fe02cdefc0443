"""What a champion was made of as a picture: three columns of boxes with arrows between them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from nested_core.text.foreign_text import escape

COLUMN, BOX_WIDTH, BOX_HEIGHT, ROW, MARGIN = 250, 210, 62, 80, 10
PIXELS_BETWEEN_ARROWS = 18
MAX_SHOWN_CHARACTERS = 28
BOX_COLOUR, LINE_COLOUR, TEXT_COLOUR = "#eef3fa", "#7a8ba3", "#1f2d3d"


@dataclass(frozen=True)
class LineageNode:
    """A box of the picture: what it is, and a line or two about which."""

    title: str
    lines: Sequence[str]


def draw_lineage(sources: Sequence[LineageNode], run: LineageNode, champion: LineageNode) -> str:
    """The sources, the run that they went into, and the champion that came out, as SVG."""
    height = 2 * MARGIN + ROW * len(sources) - (ROW - BOX_HEIGHT)
    middle = height / 2
    run_x, champion_x = MARGIN + COLUMN, MARGIN + 2 * COLUMN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{champion_x + BOX_WIDTH + MARGIN}" '
        f'height="{height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<defs><marker id="arrow" markerWidth="8" markerHeight="8" refX="7" refY="4" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{LINE_COLOUR}"/></marker></defs>',
    ]
    for index, source in enumerate(sources):
        center = MARGIN + ROW * index + BOX_HEIGHT / 2
        arrives = middle + PIXELS_BETWEEN_ARROWS * (index - (len(sources) - 1) / 2)
        parts.append(_draw_arrow(MARGIN + BOX_WIDTH, center, run_x, arrives))
        parts.append(_draw_node(source, MARGIN, center))
    parts.append(_draw_arrow(run_x + BOX_WIDTH, middle, champion_x, middle))
    parts.append(_draw_node(run, run_x, middle))
    parts.append(_draw_node(champion, champion_x, middle))
    return "".join([*parts, "</svg>"])


def _draw_arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    path = f"M{x} {y:.0f}L{to_x} {to_y:.0f}"
    return f'<path d="{path}" stroke="{LINE_COLOUR}" stroke-width="1.5" marker-end="url(#arrow)"/>'


def _draw_node(node: LineageNode, x: float, center: float) -> str:
    top = center - BOX_HEIGHT / 2
    box = (
        f'<rect x="{x}" y="{top:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" '
        f'fill="{BOX_COLOUR}" stroke="{LINE_COLOUR}"/>'
        f'<text x="{x + 10}" y="{top + 19:.0f}" font-weight="bold" fill="{TEXT_COLOUR}">'
        f"{_escape_and_cut(node.title)}</text>"
    )
    lines = [
        f'<text x="{x + 10}" y="{top + 37 + 16 * index:.0f}" fill="{TEXT_COLOUR}">'
        f"{_escape_and_cut(line)}</text>"
        for index, line in enumerate(node.lines)
    ]
    return box + "".join(lines)


def _escape_and_cut(text: str) -> str:
    """The text for SVG, cut so that it fits a box."""
    shown = escape(text)
    if len(shown) > MAX_SHOWN_CHARACTERS:
        shown = f"{shown[: MAX_SHOWN_CHARACTERS // 2]}...{shown[3 - MAX_SHOWN_CHARACTERS // 2 :]}"
    return html.escape(shown)
