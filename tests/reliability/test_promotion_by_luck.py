"""A champion by luck: losses of two adapters swapped at random an example promote hardly ever."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nested_core.config.sections import GateSection
from nested_core.measure.losses.held_out_loss import (
    LoadedBase,
    choose_held_out_examples,
    read_nonempty_splits,
)
from nested_core.measure.losses.loss_figures import summarise_champion
from nested_core.records.losses import ExampleLosses
from tests.example import DATA, train_example

TRAINED_ON = 12
DRAWS = 1_000
MOST_PROMOTED = 0.04


def write_data(folder: Path) -> Path:
    """A few of the example's lines to train on, and all others to judge by."""
    folder.mkdir()
    lines = (DATA / "train.jsonl").read_text().splitlines()
    others = lines[TRAINED_ON:]
    (folder / "train.jsonl").write_text("\n".join(lines[:TRAINED_ON]) + "\n")
    (folder / "valid.jsonl").write_text((DATA / "valid.jsonl").read_text())
    (folder / "test.jsonl").write_text("\n".join(others) + "\n")
    return folder


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> ExampleLosses:
    """The losses of adapters of two seeds on examples that neither was trained on."""
    folder = tmp_path_factory.mktemp("luck")
    data = str(write_data(folder / "data"))
    runs = [
        train_example(folder / f"run-{seed}", data=data, seed=seed, iters=24) for seed in range(2)
    ]
    config, run = runs[0].config, runs[0].run
    held_out = choose_held_out_examples(read_nonempty_splits(config, run))
    assert held_out is not None
    (first, tokens), (second, _) = LoadedBase.load(config).example_loss_sums(
        [done.run.adapter for done in runs], held_out.split
    )
    before = np.zeros_like(tokens)
    lines = held_out.split.lines.astype(np.int64)
    return ExampleLosses(
        "test.jsonl", lines, tokens, before, first / tokens, champion=second / tokens
    )


@pytest.mark.reliability
def test_two_adapters_with_their_losses_swapped_at_random_are_hardly_ever_promoted(
    losses: ExampleLosses, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(20251121)
    champion = losses.champion
    assert champion is not None
    promoted = 0
    for _ in range(DRAWS):
        is_swapped = random.random(len(losses)) < 0.5
        drawn = replace(
            losses,
            after=np.where(is_swapped, champion, losses.after),
            champion=np.where(is_swapped, losses.after, champion),
        )
        interval = summarise_champion("0" * 64, drawn, GateSection()).interval
        assert interval is not None
        promoted += int(interval[1] < 0)
    with capsys.disabled():
        print(f"\n{promoted} of {DRAWS} draws of {len(losses)} examples promoted")
    assert promoted <= MOST_PROMOTED * DRAWS
