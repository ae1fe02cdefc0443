"""The figures of docs/preferences.md on the comparison with TRL are those of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.commands import read_rows

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs/preferences.md").read_text("utf-8").split())


def rows_of(name: str) -> dict[str, dict[str, Any]]:
    return {row["cell"]: row for row in read_rows(ROOT / "benchmarks/preferences" / name)}


def said(text: str, *rows: dict[str, Any]) -> str:
    return text.format(*rows).replace("%", " %")


@pytest.mark.parametrize(
    "text",
    [
        "base answers in {0[words][0]:.1f} words, ours in {0[words][1]:.1f}",
        "TRL's in {1[words][1]:.1f}",
        "{0[before]:.1%} before, {0[after]:.1%} ours, {1[after]:.1%} TRL",
        "{2[before]:.3f} before, {2[after]:.3f} ours, {3[after]:.3f} TRL",
        "divergence of {4[preferences][kl_initial]:.1f} nats",
    ],
)
def test_the_page_has_the_figures_of_the_collapsed_runs(text: str) -> None:
    rows = rows_of("rows-collapsed.jsonl")
    cells = ("share base,", "general loss", "training")
    names = [f"{cell} {arm} 0" for cell in cells for arm in ("ours", "trl")]
    assert said(text, *(rows[name] for name in names)) in PAGE


@pytest.mark.parametrize(
    ("file", "cell"),
    [
        *(("rows.jsonl", f"share trl, ours {seed}") for seed in (0, 2, 3)),
        ("rows.jsonl", "share trl, ours, all seeds"),
        ("rows-slow-rate.jsonl", "share trl, ours 0"),
    ],
)
def test_the_page_has_the_shares_of_both_programs_and_their_difference(
    file: str, cell: str
) -> None:
    row = rows_of(file)[cell]
    percent = {key: 100 * row[key] for key in ("before", "after", "difference")}
    low, high = (100 * end for end in row["interval"])
    shares = "{after:.1f} % | {before:.1f} % | {difference:+.1f} points (".format(**percent)
    assert shares in PAGE
    assert f"{low:+.1f} to {high:+.1f}) |" in PAGE.partition(shares)[2][:60]


def test_the_page_has_words_loss_seconds_and_memory_of_both_programs() -> None:
    rows, slow = rows_of("rows.jsonl"), rows_of("rows-slow-rate.jsonl")
    ours, trl = (
        [rows[f"share base, {arm} 0"], slow[f"share base, {arm} 0"], rows[f"general loss {arm} 0"]]
        for arm in ("ours", "trl")
    )
    texts = "{0[words][1]:.1f} and {1[words][1]:.1f}", "{2[after]:.3f}"
    before = f"{ours[0]['words'][0]:.1f}", f"{ours[2]['before']:.3f}"
    for base, text in zip(before, texts, strict=True):
        assert f"| {base} | {text.format(*ours)} | {text.format(*trl)} | |" in PAGE
    mine, theirs = rows["training ours 3"], rows["training trl 3"]
    for text in (
        "| | {0[training_seconds]:.0f} | {1[training_seconds]:.0f} | |",
        "| | {0[process_seconds]:.0f}, with the gate | {1[process_seconds]:.0f} | |",
        "| | {0[device_memory_gb]:.1f} GB | {1[device_memory_gb]:.1f} GB | |",
    ):
        assert text.format(mine, theirs) in PAGE
    cold = rows["training ours 0"]["process_seconds"]
    assert f"our process took {cold:.0f} s in place of {mine['process_seconds']:.0f}" in PAGE


def test_the_page_has_the_figures_of_the_run_on_a_cpu() -> None:
    rows = rows_of("rows-cpu.jsonl")
    names = [f"{cell} ours" for cell in ("share trl,", "share base,", "general loss")]
    names += ["general loss trl", "training ours", "training trl"]
    apart, share, general, of_trl, ours, trl = (rows[f"{name} 0"] for name in names)
    percent = {key: 100 * apart[key] for key in ("before", "after", "difference")}
    low, high = (100 * end for end in apart["interval"])
    for text in (
        f"{share['prompts']} fresh prompts",
        f"base {100 * share['before']:.1f} %, ours {percent['after']:.1f} %, TRL"
        f" {percent['before']:.1f} %, ours less TRL {percent['difference']:+.1f} points"
        f" ({low:+.1f} to {high:+.1f})",
        f"Words an answer: {share['words'][0]:.1f}, ours {apart['words'][1]:.1f}"
        f", TRL {apart['words'][0]:.1f}",
        f"{general['before']:.3f}, ours {general['after']:.3f}, TRL {of_trl['after']:.3f}",
        f"took us **{ours['training_seconds']:.0f} s, TRL {trl['training_seconds']:.0f}**",
        f"held {ours['resident_memory_gb']:.1f} GB, TRL's {trl['resident_memory_gb']:.1f}",
    ):
        assert text in PAGE
