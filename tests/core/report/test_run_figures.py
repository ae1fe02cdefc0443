"""What every view of a run leads with, and last losses that are not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nested_core.records.run import Run, list_runs
from nested_core.report.run_comparison import compare_runs
from nested_core.report.run_outcome import list_row
from nested_core.report.run_page import read_report
from nested_core.storage.run_directory import RunDirectory
from tests.runs import add_metrics, begin_run, finished_run, write_plan_of


def test_the_offered_steps_loss_leads_and_the_last_one_stays_the_last(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    rows: list[dict[str, Any]] = [
        {"step": 0, "val_loss": 3.0},
        {"step": 8, "loss": 0.9, "val_loss": 0.807},
        {"step": 16, "loss": 0.4, "val_loss": 1.178},
    ]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = Run(run)
    assert (read.offered_step, read.offered_val_loss) == (8, 0.807)
    assert read.gate_loss == pytest.approx(2.675)
    assert (read.last_loss("train_loss"), read.last_loss("val_loss")) == ((16, 0.4), (16, 1.178))


@pytest.fixture
def diverged(tmp_path: Path) -> RunDirectory:
    """A run whose last training loss is not finite; it has no verdict."""
    run = begin_run(tmp_path / "runs" / "one")
    write_plan_of(run)
    add_metrics(run, 10)
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 11, "iteration": 11, "loss": None}) + "\n")
    return run


def test_a_last_loss_that_is_not_finite_is_said_to_be_so_everywhere(
    diverged: RunDirectory,
) -> None:
    document = Run(diverged).to_json()
    assert (document["train_loss"], document["not_finite"]) == (None, ["train_loss"])
    comparison = compare_runs([diverged.path])
    assert comparison.losses()["not_finite"] == [["training"]]
    rows = {str(name): cells for name, *cells in comparison.rows()}
    assert rows["training loss, mean of the last report"] == ["not finite"]
    assert "training loss not finite" in read_report(diverged.path).to_html()


def test_before_anything_is_offered_the_last_validation_loss_is_shown_as_that(
    diverged: RunDirectory,
) -> None:
    (listed,) = list_runs(diverged.path.parent)
    assert listed.offered_step is None
    *_, step, val_loss, gate_loss, _ = list_row(listed)
    assert (step, val_loss, gate_loss) == ("- (at 11 of 100)", f"{7.5 / 10**0.5:.4g} (last)", None)


def test_what_was_trained_is_told_in_steps_and_passes(diverged: RunDirectory) -> None:
    with diverged.metrics.open("a") as file:  # of 100 steps, 20 passes
        file.write(json.dumps({"step": 25, "loss": 1.0}) + "\n")
    assert Run(diverged).describe_length() == "25 of 100 steps, 5 passes over train.jsonl"


def test_iters_are_no_setting_of_a_run_whose_epochs_decide(tmp_path: Path) -> None:
    by_epochs = begin_run(tmp_path / "one", training={"epochs": 3, "max_grad_norm": 1.0})
    by_iters = begin_run(tmp_path / "two")
    comparison = compare_runs([by_epochs.path, by_iters.path])
    assert comparison.differing_settings()["iters"][0] is None


def test_one_folder_by_two_spellings_is_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    runs = [
        begin_run(tmp_path / name, model=spelt)
        for name, spelt in (("a", "model"), ("b", str(model)))
    ]
    assert "model" not in compare_runs([run.path for run in runs]).differing_settings()
