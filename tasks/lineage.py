"""What a champion was made of: data set, run and champion as Prefect assets, and as a picture.

The open-source server keeps a materialization as an event whose related resources are what the
asset was made of; it has no page of assets (Prefect Cloud has), so the champion's page has a
picture of the same.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefect.assets import Asset, AssetProperties
from prefect.context import AssetContext
from prefect.events import emit_event

from nested_core.text.digest_format import shorten_digest
from nested_core.text.foreign_text import escape

_INVALID_KEY_CHARACTERS = re.compile(r"[^A-Za-z0-9._~-]+")
MATERIALIZATION_EVENT = "prefect.asset.materialization.succeeded"
MATERIALIZED_BY = "nested-tune"

# The picture: three columns of boxes.
COLUMN, BOX_WIDTH, BOX_HEIGHT, ROW, MARGIN = 250, 210, 62, 80, 10
PIXELS_BETWEEN_ARROWS = 18
MAX_SHOWN_CHARACTERS = 28
BOX_COLOUR, LINE_COLOUR, TEXT_COLOUR = "#eef3fa", "#7a8ba3", "#1f2d3d"


def dataset_asset(adapter: str, digest: str, source: str) -> Asset:
    """The data that a run was trained on, by its digest."""
    key = f"dataset://{adapter}/{shorten_digest(digest)}"
    return Asset(key=key, properties=AssetProperties(name=escape(f"data of {adapter}: {source}")))


def run_asset(adapter: str, folder: str) -> Asset:
    """A run that the gate verified, by the name of its folder."""
    name = _INVALID_KEY_CHARACTERS.sub("-", folder)
    properties = AssetProperties(name=escape(f"run of {adapter}: {folder}"))
    return Asset(key=f"run://{adapter}/{name}", properties=properties)


def champion_asset(adapter: str) -> Asset:
    """The champion of an adapter's name; each new champion materializes it anew."""
    properties = AssetProperties(name=f"champion of {adapter}")
    return Asset(key=f"champion://{adapter}", properties=properties)


def emit_materialization(
    asset: Asset, made_of: Sequence[Asset], adapter: str, metadata: Mapping[str, Any]
) -> None:
    """Emit the event that Prefect's `@materialize` emits, once it is certain that there is one.

    The decorator would emit it for every end of its task, and a promotion that is refused ends
    well too. The adapter is a related resource, so that its feed of events shows it.
    """
    related = [AssetContext.asset_as_related(source) for source in made_of]
    related.append(AssetContext.related_materialized_by(MATERIALIZED_BY))
    related.append(
        {"prefect.resource.id": f"adapter.{adapter}", "prefect.resource.role": "adapter"}
    )
    emit_event(
        MATERIALIZATION_EVENT,
        resource=AssetContext.asset_as_resource(asset),
        related=related,
        payload=dict(metadata),
    )


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
