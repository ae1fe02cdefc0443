"""An adapter's page: its champion, what that was made of, and the champions before it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Self

from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry import history, read_version_losses
from nested_core.registry.ledger import describe_author
from nested_core.registry.serving_status import describe_server, read_servers
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.report.verdict_page import describe_losses, describe_suites
from nested_core.text.digest_format import shorten_digest
from nested_core.text.foreign_text import escape
from nested_core.text.markdown_page import MarkdownPage

COLUMN, BOX_WIDTH, BOX_HEIGHT, ROW, MARGIN = 250, 210, 62, 80, 10
PIXELS_BETWEEN_ARROWS = 18
MAX_SHOWN_CHARACTERS = 28
BOX_COLOUR, LINE_COLOUR, TEXT_COLOUR = "#eef3fa", "#7a8ba3", "#1f2d3d"

MAX_SHOWN_CHANGES = 15
ACTION_VERBS = {
    "promote": "promoted",
    "rollback": "rolled back to",
    "moved": "link moved by hand to",
}
CHANGE_COLUMNS = ("when (UTC)", "what", "version", "loss when registered", "by")


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


@dataclass(frozen=True)
class ChampionRecord:
    """A version with the record of how it was made, and with the verdict that it came with."""

    registry: Path
    name: str
    version: str
    provenance: Mapping[str, Any]
    verdict: Verdict

    @classmethod
    def read(cls, registry: Path, name: str, version: str) -> Self:
        """Read it from the version's folder; DamagedError for a file that is not as written."""
        folder = version_folder(registry, name, version)
        verdict = read_verdict(folder / GATE_NAME)
        return cls(registry, name, version, read_provenance(folder), verdict)

    @property
    def place(self) -> str:
        """The folder of the name, by which the page of another registry is told apart."""
        return str(self.registry.resolve() / self.name)

    @property
    def run_folder_name(self) -> str:
        """The name of the run's folder."""
        return PurePath(str(self.provenance.get("run_dir"))).name

    def describe_servers(self) -> list[str]:
        """A sentence for each server of the name: since when it serves this, or why it does not."""
        servers = read_servers(self.registry, self.name)
        return [describe_server(server, self.version) for server in servers]


def describe_champion(champion: ChampionRecord) -> MarkdownPage:
    """The champion in a few lines, the picture of what it was made of, and those before it."""
    page = MarkdownPage(f"{champion.name}: champion {shorten_digest(champion.version)}")
    page.add_facts(
        [
            ("Loss when it was judged", describe_losses(champion.verdict)),
            ("Answers", describe_suites(champion.verdict)),
            *(("Server", text) for text in champion.describe_servers()),
            ("Registered (UTC)", _describe_time(champion.provenance.get("registered_at"))),
            ("Run folder", str(champion.provenance.get("run_dir"))),
            ("Registry", champion.place),
        ]
    )
    page.add_heading("What it was made of")
    page.add_picture(_draw_sources(champion), "data set, base model and parent, run, champion")
    page.add_heading("Champions so far")
    page.add_table(CHANGE_COLUMNS, _list_changes(champion.registry, champion.name))
    return page


def _draw_sources(champion: ChampionRecord) -> str:
    """The picture of what a champion was made of."""
    provenance = champion.provenance
    config = provenance.get("config") or {}
    parent, dataset = provenance.get("parent"), provenance.get("dataset_digest")
    sources = [
        LineageNode("data set", (str(config.get("data")), shorten_digest(dataset or "unknown"))),
        LineageNode("base model", (str(config.get("model")),)),
        LineageNode("parent", ("a fresh adapter" if parent is None else shorten_digest(parent),)),
    ]
    step = f"step {champion.verdict.adapter_step}"
    return draw_lineage(
        sources,
        LineageNode("run", (champion.run_folder_name, step)),
        LineageNode("champion", (champion.name, shorten_digest(champion.version))),
    )


def _list_changes(registry: Path, name: str) -> list[tuple[object, ...]]:
    """The last changes of the champion as rows, the latest first."""
    moves = [line for line in history(registry, name) if line["action"] in ACTION_VERBS]
    losses = read_version_losses(registry, name)
    return [
        (
            _describe_time(line["time"]),
            ACTION_VERBS[line["action"]],
            shorten_digest(line["version"] or "none"),
            losses.get(line["version"], {}).get("loss"),
            describe_author(line),
        )
        for line in moves[: -MAX_SHOWN_CHANGES - 1 : -1]
    ]


def _describe_time(time: object) -> str:
    """`2026-11-21T16:19:28.123456+00:00` to the minute, in the words of the history."""
    return str(time)[:16].replace("T", " ")
