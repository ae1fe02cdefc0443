"""The figures of benchmarks/preferences/README.md on TRL are those of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.commands import read_rows

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "benchmarks/preferences/README.md").read_text("utf-8").split())


def rows_of(name: str) -> dict[str, dict[str, Any]]:
    return {row["cell"]: row for row in read_rows(ROOT / "benchmarks/preferences" / name)}


CELLS_ON_A_CPU = (
    *("training ours", "training trl", "share base, ours", "share trl, ours"),
    *("general loss ours", "general loss trl"),
)


def said(text: str, *rows: dict[str, Any]) -> str:
    return text.format(*rows).replace("%", " %")


@pytest.mark.parametrize(
    "text",
    [
        "base answers in {0[words][0]:.1f} words, ours in {0[words][1]:.1f}",
        "TRL's in {1[words][1]:.1f}",
        "{0[before]:.1%} before, {0[after]:.1%} ours, {1[after]:.1%} TRL",
        "{2[before]:.3f} before, {2[after]:.3f} ours, {3[after]:.3f} TRL",
        "passes | 5e-5 | +145 | **-2.2**, from the means | {4[preferences][kl_initial]:.1f} |",
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
    told = PAGE.partition(shares)[2].partition("|")[0]
    if "seeds" in row:
        assert told.startswith(
            f"95 % interval over prompts {low:+.1f} to {high:+.1f}, over the three"
        )
    else:
        assert told == f"{low:+.1f} to {high:+.1f} over prompts) "


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
        "| | **{0[process_seconds]:.0f}**, with the gate | **{1[process_seconds]:.0f}** | |",
        "| | {0[device_memory_gb]:.1f} GB | {1[device_memory_gb]:.1f} GB | |",
    ):
        assert text.format(mine, theirs) in PAGE
    cold = rows["training ours 0"]
    assert f"{mine['process_seconds']:.0f} seconds against {theirs['process_seconds']:.0f}" in PAGE
    took = f"{cold['training_seconds']:.0f} and {cold['process_seconds']:.0f} s."
    assert f"Before, they took {took}" in " ".join(PAGE.split())


def test_the_page_has_the_figures_of_the_runs_on_a_cpu() -> None:
    rows = rows_of("rows-cpu.jsonl")
    first, second = ({name: rows[f"{name} {seed}"] for name in CELLS_ON_A_CPU} for seed in (0, 1))
    both = rows["share trl, ours, all seeds"]
    assert both["seeds"] == [0, 1]
    low, high = (100 * end for end in both["interval"])
    in_bfloat16 = rows_of("rows-cpu-bfloat16.jsonl")
    slow, alone = in_bfloat16["training trl 0"], in_bfloat16["training ours 0"]
    ours, trl = first["training ours"], first["training trl"]
    texts = [
        f"{both['prompts']} fresh prompts",
        f"ours less TRL {100 * both['difference']:+.1f} points ({low:+.1f} to {high:+.1f}"
        " over prompts)",
        f"base {100 * first['share base, ours']['before']:.1f} % of the first"
        f" {first['share base, ours']['prompts']}",
        f"mean loss of its first ten steps was {slow['log'][0]['loss']:.3f}, and"
        f" {trl['log'][0]['loss']:.3f} in float32",
        f"{100 * in_bfloat16['share trl, ours 0']['before']:.1f} % of its answers were one",
        f"took us **{alone['training_seconds']:.0f} s, TRL in bfloat16"
        f" {slow['training_seconds']:.0f}**",
        f"held {ours['resident_memory_gb']:.1f} GB, TRL's {slow['resident_memory_gb']:.1f} in"
        f" bfloat16 and {trl['resident_memory_gb']:.1f} in float32",
    ]
    for seed, cells in enumerate((first, second)):
        apart = cells["share trl, ours"]
        shares = f"{100 * apart['after']:.1f} % ours and {100 * apart['before']:.1f} % TRL"
        texts.append(f"{shares} with seed {seed}")
    apart, general = first["share trl, ours"], first["general loss ours"]
    texts += [
        f"ours {apart['words'][1]:.2f}, TRL {apart['words'][0]:.2f}",
        f"{general['before']:.4f} before, {general['after']:.4f} ours,"
        f" {first['general loss trl']['after']:.4f} TRL",
    ]
    for text in texts:
        assert text in PAGE
