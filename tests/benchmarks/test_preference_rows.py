"""The figures of docs/preferences.md on the comparison with TRL are those of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.commands import read_rows

ROOT = Path(__file__).parents[2]
ROWS = {row["cell"]: row for row in read_rows(ROOT / "benchmarks/preferences/rows.jsonl")}


@pytest.mark.parametrize(
    "said",
    [
        "base answers in {0[words][0]:.1f} words, ours in {0[words][1]:.1f}",
        "TRL's in {1[words][1]:.1f}",
        "{0[before]:.1%} before, {0[after]:.1%} ours, {1[after]:.1%} TRL",
        "{2[before]:.3f} before, {2[after]:.3f} ours, {3[after]:.3f} TRL",
        "{4[process_seconds]:.0f} s ours and {5[process_seconds]:.0f} s TRL's",
        "device {4[device_memory_gb]:.1f} and {5[device_memory_gb]:.1f} GB",
        "divergence of {4[preferences][kl_initial]:.1f} nats",
    ],
)
def test_the_page_has_the_figures_of_the_rows(said: str) -> None:
    cells = ("share base,", "general loss", "training")
    names = [f"{cell} {arm} 0" for cell in cells for arm in ("ours", "trl")]
    figures = said.format(*(ROWS[name] for name in names)).replace("%", " %")
    assert figures in " ".join((ROOT / "docs/preferences.md").read_text("utf-8").split())
