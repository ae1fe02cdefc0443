"""A run as it is read: its figures, its list, and what is damaged, which is gathered."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import ConfigError
from nested_core.records.run_status import Run, list_runs, read_run
from nested_core.records.verdict import Reason
from nested_core.report.outcome import describe_end, describe_outcome, list_row
from nested_core.storage.run_directory import RunDirectory
from tests.runs import add_metrics, begin_run, finished_run, make_losses, write_plan_of


def write_metrics(run: RunDirectory, *rows: dict[str, Any]) -> None:
    with run.metrics.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_the_offered_steps_loss_leads_and_the_last_one_stays_the_last(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    folder.metrics.unlink()
    last = {"step": 16, "loss": 0.4, "val_loss": 1.178}
    write_metrics(folder, {"step": 0, "val_loss": 3.0}, {"step": 8, "val_loss": 0.807}, last)
    run = Run(folder)
    assert (run.offered_step, run.offered_val_loss) == (8, 0.807)
    assert run.gate_loss == pytest.approx(2.675)
    assert (run.last_loss("train_loss"), run.last_loss("val_loss")) == ((16, 0.4), (16, 1.178))


@pytest.fixture
def diverged(tmp_path: Path) -> RunDirectory:
    """A run whose last training loss is not finite; it has no verdict."""
    run = begin_run(tmp_path / "runs" / "one")
    write_plan_of(run)
    add_metrics(run, 10)
    write_metrics(run, {"step": 11, "iteration": 11, "loss": None})
    return run


def test_a_last_loss_that_is_not_finite_is_said_to_be_so(diverged: RunDirectory) -> None:
    run = Run(diverged)
    document = run.to_json()
    assert (document["train_loss"], document["not_finite"]) == (None, ["train_loss"])
    assert run.describe_last_losses()["training loss"].startswith("not finite (train.jsonl")
    assert "training loss not finite" in describe_end(run)


def test_before_anything_is_offered_the_last_validation_loss_is_shown_as_that(diverged) -> None:
    (listed,) = list_runs(diverged.path.parent)
    assert listed.offered_step is None
    *_, step, val_loss, gate_loss, _ = list_row(listed)
    assert (step, val_loss, gate_loss) == ("- (at 11 of 100)", f"{7.5 / 10**0.5:.4g} (last)", None)


def test_what_was_trained_is_told_in_steps_and_passes(diverged: RunDirectory) -> None:
    assert Run(diverged).describe_length() == "11 of 100 steps, 2.2 passes over train.jsonl"
    diverged.plan.unlink()
    assert Run(diverged).describe_length() == "11 of 8 steps"  # by its configuration
    write_plan_of(diverged, steps=1, epochs=0.5)
    assert Run(diverged).describe_length().startswith("11 of 1 step, ")


def test_a_step_that_was_saved_after_the_last_report_is_the_runs_step(
    diverged: RunDirectory,
) -> None:
    (diverged.checkpoints / "step-0000013").mkdir(parents=True)
    run = Run(diverged)
    assert (run.last("step"), run.step) == (11, 13)
    assert run.describe_length().startswith("13 of 100 steps")


def test_the_list_is_newest_first_and_a_damaged_run_says_so(tmp_path: Path) -> None:
    old = finished_run(tmp_path / "20261120T100000Z-00000001")
    new = finished_run(tmp_path / "20261121T100000Z-00000002")
    old.gate.write_text("{")
    (tmp_path / "no run").mkdir()
    listed = list_runs(tmp_path)
    assert [run.name for run in listed] == [new.path.name, old.path.name]
    assert [run.state for run in listed] == ["verified", "damaged"]
    assert describe_outcome(listed[1]).startswith("Damaged: ")
    assert str(old.gate) in describe_outcome(listed[1])
    assert (listed[0].step, listed[0].steps) == (8, 8)


def test_a_name_whose_digits_are_no_moment_and_a_file_that_goes_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path / "20269999T999999Z-00000001")
    files = list(run.path.iterdir())
    monkeypatch.setattr(Path, "iterdir", lambda _: iter([*files, run.path / "replaced.tmp"]))
    oldest = min(file.stat().st_mtime for file in files)
    assert Run(run).started.timestamp() == pytest.approx(oldest, abs=1e-3)


def test_what_is_no_run_or_no_folder_of_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        read_run(RunDirectory(tmp_path))
    with pytest.raises(ConfigError, match="is not a folder"):
        list_runs(tmp_path / "runs")


def test_a_file_of_the_verdict_that_has_changed_is_named_and_not_read(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    os.truncate(folder.gate_losses, 50 * 2**30)  # sparse: it fits in no memory
    run = read_run(folder)
    assert (run.losses, run.state) == (None, "verified")
    assert run.problems == [f"{folder.gate_losses} has changed since the verdict was given."]
    folder.gate_losses.write_bytes(make_losses(champion=True).render())
    assert Run(folder).losses is None


def test_a_damaged_file_is_named_once_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    folder.dataset.write_text("{")
    run = read_run(folder)
    assert (run.dataset, run.dataset, run.state) == (None, None, "verified")
    assert [str(folder.dataset) in problem for problem in run.problems] == [True]
    assert run.answers
    folder.config.write_text("iters: many\n")
    assert Run(folder).config is None


def test_a_verdict_that_was_edited_is_none(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", reasons=[Reason("unchanged", "nothing moved")])
    gate = json.loads(folder.gate.read_bytes()) | {"verdict": "passed", "reasons": []}
    folder.gate.write_text(json.dumps(gate))
    run = Run(folder)
    assert (run.verdict, run.state) == (None, "damaged")
    assert "has changed since the verdict was given" in run.problems[0]


def test_the_documented_keys_of_the_json_stay(tmp_path: Path) -> None:
    kept = {"path", "state", "step", "steps", "val_loss", "offered_step", "offered_val_loss"}
    kept |= {"gate_loss", "verdict", "started", "train_loss", "not_finite", "problem", "conclusion"}
    assert kept <= Run(finished_run(tmp_path / "run")).to_json().keys()
