"""Prefect's pages of an adapter: its champion, and the curves."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from nested_core import registry as core
from nested_core.records.plan import join_last_losses
from nested_core.report.champion import ChampionRecord, describe_champion
from nested_core.report.curves import chart_losses, describe_curves
from nested_core.text.svg_chart import STANDALONE, draw_chart
from tests.core.registry.conftest import write_run

NAME = "support-bot"


def plain(page: object) -> str:
    """A page without the backslashes of markdown."""
    return str(page).replace("\\", "")


def facts_of(page: object) -> dict[str, str]:
    return dict(re.findall(r"^- \*\*(.*?)\*\*: (.*)$", plain(page), re.MULTILINE))


def picture_of(page: object) -> str:
    data = re.search(r"base64,([A-Za-z0-9+/=]+)\)", str(page))
    assert data is not None
    return base64.b64decode(data[1]).decode()


def register(folder: Path, seed: int, **provenance: Any) -> str:
    run = write_run(folder / f"night-{seed}", seed)
    config = {"data": "tickets/<b>2026", "model": "Qwen/Qwen3-0.6B"}
    recorded = {"run_dir": str(run), "config": config, "dataset_digest": "da7a" * 16} | provenance
    return core.register(run, folder / "registry", NAME, recorded)


def test_a_champions_page_says_what_it_was_made_of_and_lists_those_before(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    first = register(tmp_path, 1)
    second = register(tmp_path, 2, parent=first)
    core.promote(registry, NAME, first, by="ann")
    core.promote(registry, NAME, second, by="policy")
    page = describe_champion(ChampionRecord.read(registry, NAME, second))
    facts = facts_of(page)
    assert facts["Data set"] == "tickets/<b>2026, da7ada7ada7a"
    assert (facts["Base model"], facts["Parent"]) == ("Qwen/Qwen3-0.6B", first[:12])
    assert facts["Run folder"].endswith("night-2")
    assert "<svg" not in str(page)
    assert "base64" not in str(page)
    core.rollback(registry, NAME, by="bob", reason="it is slow")
    page = describe_champion(ChampionRecord.read(registry, NAME, first))
    assert [row.split(" | ")[1:] for row in str(page).splitlines()[-3:]] == [
        ["rolled back to", first[:12], "1.2", "bob: it is slow |"],
        ["promoted", second[:12], "1.2", "policy |"],
        ["promoted", first[:12], "1.2", "ann |"],
    ]


def curves_of(count: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"step": s, "loss": 4.0 / (s + 1)} for s in range(count)]
    return [*records, {"step": count, "val_loss": 0.123456789}]


def test_the_curves_name_their_latest_values_and_need_no_network() -> None:
    page = str(describe_curves(curves_of(50), 50, "examples/*bold*"))
    drawn = picture_of(page)
    assert drawn.count('fill="none"') == 1  # a line; the one evaluation is a dot
    assert "training loss 0.08<" in drawn
    assert "validation loss 0.1235<" in drawn
    assert "http" not in page
    assert "validation loss 0.1235 (step 50)" in page.replace("\\", "")
    assert r"examples/\*bold\*" in page
    assert join_last_losses(curves_of(50), None) in page.replace("\\", "")


def test_the_first_report_is_a_picture_and_nothing_before_it_and_no_loss_that_is_not_finite() -> (
    None
):
    records: list[dict[str, Any]] = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]
    drawn = draw_chart(chart_losses(records, 100), STANDALONE)
    assert drawn.count("<circle") == 1
    assert "training loss 2.5<" in drawn
    assert "validation loss: none yet<" in drawn
    assert "data:image" not in str(describe_curves([], 50, "data"))


def test_a_picture_of_many_steps_is_as_small_as_one_of_few() -> None:
    drawn = draw_chart(chart_losses(curves_of(100_000), 100_000), STANDALONE)
    assert len(drawn) < 12_000
    assert "nats/token (logarithmic)<" in drawn
