"""An adapter's page: its champion, what that was made of, and the champions before it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from prefect import get_run_logger

from nested_core.registry import history, read_champion
from nested_core.registry.gate_file import GATE_NAME, MAX_GATE_BYTES
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.storage.strict_files import read_json
from tasks.artifact_client import ArtifactClient, artifact_key
from tasks.lineage import (
    LineageNode,
    champion_asset,
    dataset_asset,
    draw_lineage,
    emit_materialization,
    run_asset,
)
from tasks.markdown_page import MarkdownPage
from tasks.verdict_text import describe_losses, describe_suite, shorten_digest

SHOWN_CHANGES = 15


def publish_champion(registry: Path, name: str) -> None:
    """Publish the page of the champion that stands now, and its lineage as an event.

    The champion has moved by then: a server that cannot be reached is only logged.
    """
    try:
        version = read_champion(registry, name)
        if version is None:
            return
        folder = version_folder(registry, name, version)
        provenance = read_provenance(folder)
        verdict = read_json(folder / GATE_NAME, MAX_GATE_BYTES)
        page = describe_champion(name, version, provenance, verdict)
        changes = history(registry, name)
        _add_changes(page, registry, name, changes)
        description = (
            f"The champion of {name}: {shorten_digest(version)}, {_describe_loss(verdict)}"
        )
        with ArtifactClient() as artifacts:
            artifacts.publish_page(artifact_key(name, "champion"), page, description)
        config = provenance.get("config") or {}
        source = run_asset(name, PurePath(str(provenance.get("run_dir"))).name)
        metadata = {
            "version": version,
            "dataset": dataset_asset(
                name, str(provenance.get("dataset_digest")), str(config.get("data"))
            ).key,
            "parent": provenance.get("parent"),
        }
        emit_materialization(champion_asset(name), [source], name, metadata)
    except Exception as error:
        get_run_logger().warning("The page of %s's champion is not up to date: %s", name, error)


def describe_champion(
    name: str, version: str, provenance: Mapping[str, Any], verdict: Mapping[str, Any]
) -> MarkdownPage:
    """The champion in four lines, and the picture of what it was made of."""
    config = provenance.get("config") or {}
    suites = "; ".join(map(describe_suite, verdict.get("tasks") or []))
    page = MarkdownPage(f"{name}: champion {shorten_digest(version)}")
    page.add_facts(
        [
            ("Loss when it was judged", _describe_loss(verdict)),
            ("Answers", suites or "no suite of questions (gate.tasks) was asked"),
            ("Registered", _describe_time(provenance.get("registered_at"))),
            ("Run folder", str(provenance.get("run_dir"))),
        ]
    )
    parent = provenance.get("parent")
    sources = [
        LineageNode(
            "data set",
            (str(config.get("data")), shorten_digest(str(provenance.get("dataset_digest")))),
        ),
        LineageNode("base model", (str(config.get("model")),)),
        LineageNode("parent", (shorten_digest(parent) if parent else "a fresh adapter",)),
    ]
    run = LineageNode(
        "run",
        (PurePath(str(provenance.get("run_dir"))).name, f"step {verdict.get('adapter_step')}"),
    )
    champion = LineageNode("champion", (name, shorten_digest(version)))
    page.add_heading("What it was made of")
    page.add_picture(
        draw_lineage(sources, run, champion), "data set, model and parent, run, champion"
    )
    return page


def _add_changes(
    page: MarkdownPage, registry: Path, name: str, changes: list[dict[str, Any]]
) -> None:
    """A table of the champions so far, the latest first."""
    moves = [line for line in changes if line["action"] in ("promote", "rollback")]
    page.add_heading("Champions so far")
    rows = [
        (
            _describe_time(line["time"]),
            "promoted" if line["action"] == "promote" else "rolled back to",
            shorten_digest(line["version"] or "none"),
            _read_loss(registry, name, line["version"]),
            line["by"],
        )
        for line in moves[: -SHOWN_CHANGES - 1 : -1]
    ]
    page.add_table(("when (UTC)", "what", "version", "validation loss", "by"), rows)


def _read_loss(registry: Path, name: str, version: str | None) -> float | None:
    """The loss that a version was registered with; None once it is collected."""
    if version is None:
        return None
    path = version_folder(registry, name, version) / GATE_NAME
    if not path.exists():
        return None
    loss = (read_json(path, MAX_GATE_BYTES).get("validation") or {}).get("loss_after")
    return None if loss is None else float(loss)


def _describe_loss(verdict: Mapping[str, Any]) -> str:
    return describe_losses(verdict) if verdict.get("validation") else "no loss was measured"


def _describe_time(time: object) -> str:
    """`2026-11-21T16:19:28.123456+00:00` to the minute, in the words of the history."""
    return str(time)[:16].replace("T", " ")
