"""An adapter's page: its champion, what that was made of, and the champions before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Self

from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry import history, read_version_losses
from nested_core.registry.serving_status import (
    describe_server,
    read_servers,
    read_serving_settings,
)
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.report.lineage_picture import LineageNode, draw_lineage
from nested_core.report.verdict_page import describe_losses, describe_suites
from nested_core.text.digest_format import shorten_digest
from nested_core.text.markdown_page import MarkdownPage

MAX_SHOWN_CHANGES = 15
ACTION_VERBS = {
    "promote": "promoted",
    "rollback": "rolled back to",
    "moved": "link moved by hand to",
}
CHANGE_COLUMNS = ("when (UTC)", "what", "version", "loss when registered", "by")


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
        _, urls = read_serving_settings(self.registry, self.name, self.version)
        servers = read_servers(self.registry, self.name, urls)
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
            f"{line['by']}: {line['reason']}" if line.get("reason") else line["by"],
        )
        for line in moves[: -MAX_SHOWN_CHANGES - 1 : -1]
    ]


def _describe_time(time: object) -> str:
    """`2026-11-21T16:19:28.123456+00:00` to the minute, in the words of the history."""
    return str(time)[:16].replace("T", " ")
