"""An adapter's page: what its champion was made of, and the champions before it."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from nested_core import registry as core
from nested_core.report.champion_page import ChampionRecord, describe_champion
from tests.core.registry.conftest import write_run

NAME = "support-bot"


def register(folder: Path, seed: int, **provenance: Any) -> str:
    run = write_run(folder / f"night-{seed}", seed)
    config = {"data": "tickets/<b>2026", "model": "Qwen/Qwen3-0.6B"}
    recorded = {"run_dir": str(run), "config": config, "dataset_digest": "da7a" * 16} | provenance
    return core.register(run, folder / "registry", NAME, recorded)


def page_of(registry: Path, version: str) -> str:
    return str(describe_champion(ChampionRecord.read(registry, NAME, version)))


def picture_of(page: str) -> str:
    data = re.search(r"base64,([A-Za-z0-9+/=]+)\)", page)
    assert data is not None
    return base64.b64decode(data[1]).decode()


def test_the_page_draws_data_model_parent_and_run_of_the_champion(tmp_path: Path) -> None:
    first = register(tmp_path, 1)
    second = register(tmp_path, 2, parent=first)
    core.promote(tmp_path / "registry", NAME, second, by="ann")
    drawn = picture_of(page_of(tmp_path / "registry", second))
    for text in ("tickets/&lt;b&gt;2026", "da7ada7ada7a", "Qwen/Qwen3-0.6B", first[:12], "night-2"):
        assert text in drawn
    assert second[:12] in drawn


def test_the_page_lists_the_champions_so_far_with_their_losses(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    first, second = register(tmp_path, 1), register(tmp_path, 2)
    core.promote(registry, NAME, first, by="ann")
    core.promote(registry, NAME, second, by="policy")
    core.rollback(registry, NAME, by="bob", reason="it is slow")
    rows = page_of(registry, first).splitlines()[-3:]
    assert [row.split(" | ")[1:] for row in rows] == [
        ["rolled back to", first[:12], "1.2", "bob: it is slow |"],
        ["promoted", second[:12], "1.2", "policy |"],
        ["promoted", first[:12], "1.2", "ann |"],
    ]
