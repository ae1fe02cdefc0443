"""An adapter's page: its champion, what that was made of, and the champions before it."""

from __future__ import annotations

from pathlib import Path

from nested_core.records.verdict import Verdict
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


def describe_champion(registry: Path, name: str, version: str, verdict: Verdict) -> Document:
    """Return the champion's page: its verdict, what it was made of, and the champions before it.

    version: the champion.
    verdict: its first verdict, from its gate.json.

    Raises DamagedError for a provenance.json that is not as it was written.
    """
    provenance = read_provenance(version_folder(registry, name, version))
    config = provenance.get("config") or {}
    parent, dataset = provenance.get("parent"), provenance.get("dataset_digest")
    facts = [
        ("Loss at its verdict", verdict.describe_losses()),
        ("Registered (UTC)", format_minute(provenance.get("registered_at"))),
        ("Run folder", str(provenance.get("run_dir"))),
        ("Data set", f"{config.get('data')}, {shorten_digest(dataset or 'unknown')}"),
        ("Base model", str(config.get("model"))),
        ("Parent", "a fresh adapter" if parent is None else shorten_digest(parent)),
        ("Registry", str(registry.resolve() / name)),  # two registries may have the same name
    ]
    return Document(
        f"{name}: champion {shorten_digest(version)}",
        [
            Facts(facts),
            check_table(verdict),
            Section("Champions so far", [Table("", CHANGE_COLUMNS, _list_changes(registry, name))]),
        ],
    )


def _list_changes(registry: Path, name: str) -> list[tuple[object, ...]]:
    """Return the last changes of the champion as rows of a table, the latest first."""
    changes = [line for line in history(registry, name) if line["action"] in ACTION_VERBS]
    verdicts = read_version_verdicts(registry, name).items()
    losses = {version: verdict.describe_losses() for version, verdict in verdicts}
    return [
        (
            format_minute(line["time"]),
            ACTION_VERBS[line["action"]],
            shorten_digest(line["version"] or "none"),
            losses.get(line["version"]),
            describe_author(line),
        )
        for line in changes[: -MAX_SHOWN_CHANGES - 1 : -1]
    ]


def format_minute(time: object) -> str:
    """Format `2026-11-21T16:19:28.123456+00:00` to the minute, as the history shows it."""
    return str(time)[:16].replace("T", " ")
