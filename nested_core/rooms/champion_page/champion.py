"""An adapter's page: its champion, what that was made of, and the champions before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Self

from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.records.verdict_table import check_table
from nested_core.registry import history, read_version_verdicts
from nested_core.registry.ledger import describe_author
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.text.digest_format import shorten_digest
from nested_core.text.document import Document, Facts, Section, Table

MAX_SHOWN_CHANGES = 15
ACTION_VERBS = {
    "promote": "promoted",
    "rollback": "rolled back to",
    "moved": "link moved by hand to",
}
CHANGE_COLUMNS = ("when (UTC)", "what", "version", "verdict when registered", "by")


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


def describe_champion(champion: ChampionRecord) -> Document:
    """The champion, its verdict, what it was made of, and the champions before it."""
    provenance = champion.provenance
    config = provenance.get("config") or {}
    parent, dataset = provenance.get("parent"), provenance.get("dataset_digest")
    facts = [
        ("Loss at its verdict", champion.verdict.describe_losses()),
        ("Registered (UTC)", _describe_time(provenance.get("registered_at"))),
        ("Run folder", str(provenance.get("run_dir"))),
        ("Data set", f"{config.get('data')}, {shorten_digest(dataset or 'unknown')}"),
        ("Base model", str(config.get("model"))),
        ("Parent", "a fresh adapter" if parent is None else shorten_digest(parent)),
        ("Registry", champion.place),
    ]
    changes = _list_changes(champion.registry, champion.name)
    return Document(
        f"{champion.name}: champion {shorten_digest(champion.version)}",
        [
            Facts(facts),
            check_table(champion.verdict),
            Section("Champions so far", [Table("", CHANGE_COLUMNS, changes)]),
        ],
    )


def _list_changes(registry: Path, name: str) -> list[tuple[object, ...]]:
    """The last changes of the champion as rows, the latest first."""
    moves = [line for line in history(registry, name) if line["action"] in ACTION_VERBS]
    verdicts = read_version_verdicts(registry, name).items()
    words = {version: verdict.describe_losses() for version, verdict in verdicts}
    return [
        (
            _describe_time(line["time"]),
            ACTION_VERBS[line["action"]],
            shorten_digest(line["version"] or "none"),
            words.get(line["version"]),
            describe_author(line),
        )
        for line in moves[: -MAX_SHOWN_CHANGES - 1 : -1]
    ]


def _describe_time(time: object) -> str:
    """`2026-11-21T16:19:28.123456+00:00` to the minute, in the words of the history."""
    return str(time)[:16].replace("T", " ")
