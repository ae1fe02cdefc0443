"""What a terminal and a log show of a run, from its plan and its records alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.terminal.run_follower import format_line
from nested_core.records.metrics import append_metrics
from nested_core.records.plan import TrainingPlan, write_plan
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.validation_losses import StepLosses, append_step_losses
from nested_core.training.reports.run_progress import RunProgress

PLAN = TrainingPlan(
    steps=200,
    iterations=400,
    epochs=4.0,
    first_step=0,
    frequencies=(1, 4),
    offers_best=True,
    training_file="train.jsonl",
    validation_file="valid.jsonl",
    validation_examples=10,
    memory_forecast_gb=3.1,
    memory_limit_gb=24.0,
)


def report(step: int, **values: Any) -> dict[str, Any]:
    losses = {"loss": 8 / step, "learning_rate": 1e-4, "grad_norm": 0.5, "peak_memory_gb": 2.25}
    counts = {"tokens_per_second": 1234.5, "updates": [step, step // 4], "skipped": [0, 1]}
    return {"step": step, "iteration": 2 * step} | losses | counts | values


RECORDS = [
    {"step": 0, "iteration": 0, "val_loss": 9.5},
    report(25),
    report(50, val_loss=0.5),
    report(75),
    report(100, val_loss=0.75),
]


def view_of(*records: dict[str, Any]) -> RunProgress:
    return RunProgress(
        RunDirectory(Path("runs/one")),
        PLAN,
        list(records),
        seconds=12.0,
        reported_at=10.0,
        first_report=(100, 5.0),
    )


def test_a_line_has_the_losses_with_their_data_the_speed_the_memory_and_the_time_left() -> None:
    assert format_line(view_of(*RECORDS)) == (
        "step 100: training loss 0.08, validation loss 0.75 (valid.jsonl, 10 examples), "
        "learning rate 0.0001, gradient norm 0.5, 1,234 trained-on tokens/s, "
        "peak memory 2.25 of 24 GB, step 100 of 200 (iteration 200 of 400), about 8.0 s left"
    )


def test_the_time_left_follows_from_the_speed_since_the_first_report() -> None:
    plan = TrainingPlan(**(vars(PLAN) | {"first_step": 25}))
    view = RunProgress(RunDirectory(Path("runs/one")), plan)
    lefts = []
    for record, seconds in zip(RECORDS, (3.0, 3.0, 63.0, 65.0, 67.0), strict=True):
        view.records.append(record)  # the step before the first report is slow
        view.seconds = seconds
        view.note_report_time()
        lefts.append(view.seconds_left())
    assert lefts == [None, None, None, 10.0, 8.0]  # 50 iterations took 2 s, and 200 are left
    view.seconds += 1.5
    assert view.seconds_left() == 6.5


def test_tiers_are_not_told_of_where_all_is_updated_at_each_step() -> None:
    plan = TrainingPlan(**(vars(PLAN) | {"frequencies": (1,)}))
    view = RunProgress(
        RunDirectory(Path("runs/one")), plan, [report(25, updates=[25], skipped=[0])]
    )
    assert view.describe_tiers() == ""
    view.records.append(report(50, updates=[48], skipped=[2]))
    assert view.describe_tiers() == "skipped updates: 2"


def test_an_early_stop_and_the_candidates_that_the_offered_step_was_lowest_of_are_told(
    tmp_path: Path,
) -> None:
    view = replace(view_of(*RECORDS), run=RunDirectory(tmp_path))
    assert view.describe_offered_adapter(100) == "selected: the adapter of step 100, the last one"
    for step in (50, 100):
        losses = StepLosses(step=step, contents=None, losses=None)
        append_step_losses(view.run.validation_losses, losses)
        told = "at which all tiers had been updated" if step == 50 else "(0.5; valid.jsonl"
        assert told in view.describe_offered_adapter(50)
    result = {"step": 100, "ended": "patience"}
    assert view.describe_length(result) == "trained 100 of 200 steps (early stopping)"
    assert view.describe_length(result | {"ended": "time"}) == "trained 100 of 200 steps (cut)"
    assert view.describe_length({"step": 200, "ended": "iterations"}) == "trained 200 steps"


def test_a_plan_that_is_written_anew_says_how_many_steps_there_are(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    progress = RunProgress(run)
    for step, steps in ((2, 55), (3, 3)):
        append_metrics(run.metrics, report(step))
        write_plan(run.plan, replace(PLAN, steps=steps, iterations=steps))
        progress.read()
        assert progress.describe_position() == f"step {step} of {steps}"
