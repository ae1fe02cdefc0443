"""Preference runs in two processes are those of one process, within rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.config.loading import parse_config
from nested_core.pipeline import steps
from nested_core.records.metrics import read_metrics
from nested_core.rooms.preferences.reference_likelihoods import (
    find_likelihoods_file,
    read_likelihoods,
)
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays
from tests.example import prepare
from tests.left_out import needs_rooms
from tests.rooms.preferences.pair_data import make_values, write_pairs

pytestmark = [
    needs_rooms("ranks"),
    pytest.mark.usefixtures("forked_ranks"),
    pytest.mark.slow("trains two ranks"),
]


def train_in(processes: int, data: Path, loss: str, path: Path) -> RunDirectory:
    values = make_values(data, loss, iters=4, steps_per_report=2, steps_per_eval=4, save_every=4)
    values["training"]["processes"] = processes
    values["optimizer_config"] = {"adam": {"eps": 1e-6}}  # no moment near zero multiplies rounding
    config = parse_config(values, source="test.yaml")
    run = prepare(config, path)
    steps.train(config, run)
    return run


def val_losses(run: RunDirectory) -> list[Any]:
    return [record["val_loss"] for record in read_metrics(run.metrics) if "val_loss" in record]


def test_dpo_in_two_processes_trains_what_one_process_does(tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data")
    one, two = (train_in(count, data, "dpo", tmp_path / str(count)) for count in (1, 2))
    kept = [read_likelihoods(find_likelihoods_file(run)) for run in (one, two)]
    assert kept[0] is not None
    assert kept[1] is not None
    assert kept[1].by_conversation == pytest.approx(dict(kept[0].by_conversation), rel=1e-5)
    start, *ends = (
        load_arrays(folder / "adapters.safetensors")
        for folder in (one.initial, one.adapter, two.adapter)
    )
    moved = sum(float(np.square(ends[0][name] - start[name]).sum()) for name in start)
    apart = sum(float(np.square(ends[0][name] - ends[1][name]).sum()) for name in start)
    assert moved > 0
    assert (apart / moved) ** 0.5 < 1e-3
    assert val_losses(two) == pytest.approx(val_losses(one), rel=1e-4)
