"""What every view of a run leads with, and last losses that are not finite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nested_core.report.run_comparison import compare_runs
from nested_core.report.run_listing import list_runs
from nested_core.report.run_page import read_report
from nested_core.report.run_status import RunFigures, describe_length, read_status
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.reports.training_plan import read_plan
from tests.core.report.written_runs import add_metrics, begin_run, write_plan_of

RECORDS = [
    {"step": 0, "val_loss": 3.0},
    {"step": 100, "loss": 0.9, "val_loss": 0.807},
    {"step": 200, "loss": 0.4, "val_loss": 1.178},
]


def test_the_offered_steps_loss_leads_and_the_last_one_stays_the_last() -> None:
    figures = RunFigures.from_records(RECORDS, 100, 0.8)
    assert figures.leading_to_json() == {
        "offered_step": 100,
        "offered_val_loss": 0.807,
        "gate_loss": 0.8,
    }
    assert (figures.last_train_loss, figures.last_val_loss) == ((200, 0.4), (200, 1.178))


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
    status = read_status(diverged)
    assert (status["current_train_loss"], status["not_finite"]) == (None, ["current_train_loss"])
    (listed,) = list_runs(diverged.path.parent)
    assert (listed.train_loss, listed.not_finite) == (None, ("train_loss",))
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
    assert listed.describe_val_loss() == f"{listed.val_loss:.4g} (last)"


def test_what_was_trained_is_told_in_steps_and_passes(diverged: RunDirectory) -> None:
    plan = read_plan(diverged.plan)  # 100 steps, 20 passes
    assert describe_length(25, 100, plan) == "25 of 100 steps, 5 passes over train.jsonl"
    assert describe_length(5, 100, plan) == "5 of 100 steps, 1 pass over train.jsonl"
    assert describe_length(5, None, None) == "5 steps"


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
