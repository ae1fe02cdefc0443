"""An adapter's page on Prefect: its champion, and those before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nested_core import registry as core
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry.versions import version_folder
from nested_core.rooms.nights.pages import describe_champion
from nested_core.text.document import Document, Section, Table
from tests.builders import registering
from tests.core.registry.conftest import write_run
from tests.core.report.test_prefect_pages import facts_of

NAME = "support-bot"


def register(folder: Path, seed: int, **provenance: Any) -> str:
    run = write_run(folder / f"night-{seed}", seed)
    config = {"data": "tickets/<b>2026", "model": "Qwen/Qwen3-0.6B"}
    recorded = {"run_dir": str(run), "config": config, "dataset_digest": "da7a" * 16} | provenance
    return registering.register(run, folder / "registry", NAME, recorded)


def page_of(registry: Path, version: str) -> Document:
    verdict = read_verdict(version_folder(registry, NAME, version) / GATE_NAME)
    return describe_champion(registry, NAME, version, verdict)


def test_a_champions_page_says_what_it_was_made_of_and_lists_those_before(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    first = register(tmp_path, 1)
    second = register(tmp_path, 2, parent=first)
    registering.promote(registry, NAME, first, by="ann")
    registering.promote(registry, NAME, second, by="policy")
    page = page_of(registry, second)
    facts = facts_of(page)
    assert facts["Data set"] == "tickets/<b>2026, da7ada7ada7a"
    assert (facts["Base model"], facts["Parent"]) == ("Qwen/Qwen3-0.6B", first[:12])
    assert facts["Run folder"].endswith("night-2")
    assert "<svg" not in str(page)
    assert "base64" not in str(page)
    core.rollback(registry, NAME, by="bob", reason="it is slow")
    rows = page_of(registry, first).blocks[-1]
    assert isinstance(rows, Section)
    (changes,) = rows.blocks
    assert isinstance(changes, Table)
    losses = "validation loss 4.1 -> 1.2 (valid.jsonl, 10 examples, step 30)"
    said = f"{losses}; better loss; no questions asked"
    assert [row[1:] for row in changes.rows] == [
        ("rolled back to", first[:12], said, "bob: it is slow"),
        ("promoted", second[:12], said, "policy"),
        ("promoted", first[:12], said, "ann"),
    ]
