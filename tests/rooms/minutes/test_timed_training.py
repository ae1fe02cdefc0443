"""`training.minutes`: the steps that fit are fixed once, and the run ends when its time is over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.commands.terminal_hooks import TerminalSteps
from flows.process.stop_signals import Stopper
from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import TrainingStopped
from nested_core.pipeline.continual import settings_digest
from nested_core.pipeline.finetune import finetune
from nested_core.pipeline.hooks import Steps
from nested_core.pipeline.run_in_progress import RunInProgress
from nested_core.records.dataset import read_dataset_record
from nested_core.records.metrics import read_metrics
from nested_core.records.plan import TimePlan, TrainingPlan, read_plan, write_plan
from nested_core.records.run_status import Run
from nested_core.report.outcome import describe_end, list_figures
from nested_core.rooms.minutes import timed_training
from nested_core.rooms.minutes.blas_threads import using_blas_threads
from nested_core.rooms.minutes.forecast import Forecast
from nested_core.storage.run_directory import RunDirectory, open_run
from tests.example import SPEEDS, example_config, prepare

pytestmark = pytest.mark.slow("trains against the clock")

# A run of some seconds, with warm-up, cosine and evaluations by shares of the run.
SETTINGS: dict[str, Any] = {
    "steps_per_report": 0.05,
    "steps_per_eval": 0.25,
    "save_every": 0.25,
    "training": {"warmup_steps": 0.1, "decay": "cosine"},
}


FIXED = TimePlan(minutes=5, seconds_a_step=10, seconds_to_judge=100, began=0, spent=0)


def training_plan(time_plan: TimePlan) -> TrainingPlan:
    return TrainingPlan(
        steps=20,
        iterations=20,
        epochs=1.0,
        first_step=0,
        frequencies=(1,),
        offers_best=True,
        training_file="train.jsonl",
        validation_file="valid.jsonl",
        validation_examples=10,
        memory_forecast_gb=None,
        memory_limit_gb=1.0,
        time=time_plan,
    )


class Listening(Steps):
    """Keeps what is said, and does something after each step of the run."""

    def __init__(self, after_step: Callable[[int], None] = lambda step: None) -> None:
        self.said: list[str] = []
        self._after_step = after_step

    def on_message(self, message: str) -> None:
        """Keep it."""
        self.said.append(message)

    def on_step(self, step: int, steps: int) -> None:
        """Do it."""
        self._after_step(step)

    def of_minutes(self) -> list[str]:
        """What the room said."""
        return [message for message in self.said if message.startswith("minutes: ")]


def config_of(minutes: float | None, **changes: Any) -> FineTuneConfig:
    training = {**SETTINGS["training"], "minutes": minutes, **changes.pop("training", {})}
    return example_config(**{**SETTINGS, **changes, "training": training})


def plan_of(run: RunDirectory) -> TrainingPlan:
    plan = read_plan(run.plan)
    assert plan is not None
    return plan


def time_plan_of(run: RunDirectory) -> TimePlan:
    fixed = plan_of(run).time
    assert fixed is not None
    return fixed


def bytes_of(run: RunDirectory) -> dict[str, bytes]:
    """The adapter, and weights and optimizer state of every checkpoint."""
    files = sorted(run.path.rglob("*.safetensors"))
    return {str(path.relative_to(run.path)): path.read_bytes() for path in files}


def metrics_of(run: RunDirectory) -> list[Mapping[str, Any]]:
    return [
        {key: value for key, value in record.items() if key not in SPEEDS}
        for record in read_metrics(run.metrics)
    ]


def train_by_iterations(run: RunDirectory, path: Path, **changes: Any) -> RunDirectory:
    """The steps of a run of minutes once more, said in iterations, with its BLAS threads."""
    again = open_run(path)
    with using_blas_threads(time_plan_of(run).blas_threads):
        finetune(config_of(None, iters=plan_of(run).steps, **changes), again)
    return again


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run is refused or cut because the machine of the tests turns busy."""
    monkeypatch.setattr(timed_training, "MAX_SECONDS_BEYOND", 3600.0)
    monkeypatch.setattr(timed_training, "SHARE_BEYOND", 600.0)


def cut_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Have a run find after a step that there is time for the verdict alone."""

    def is_late(plan: TimePlan, seen: Any, *_: object) -> bool:
        return bool(seen[-1][0] >= step)

    monkeypatch.setattr(timed_training, "has_no_time_for_a_step", is_late)


@pytest.mark.slow("trains twice")
def test_a_run_of_minutes_is_that_of_as_many_iterations_bit_for_bit(tmp_path: Path) -> None:
    hooks = Listening()
    run = open_run(tmp_path / "minutes")
    result = finetune(config_of(0.1), run, hooks)
    steps = plan_of(run).steps
    assert result.training is not None
    assert result.training.step == steps >= 4
    assert read_run_config(run).iters == steps
    assert f"{steps:,} steps in 0.1 minutes" in hooks.of_minutes()[-1]
    validated = [
        step
        for record in read_metrics(run.metrics)
        if "val_loss" in record
        for step in [record["step"]]
    ]
    assert validated == [0, *range(max(5, steps // 4), steps, max(5, steps // 4)), steps]  # scaled

    other = train_by_iterations(run, tmp_path / "iterations")
    assert bytes_of(run) == bytes_of(other)
    assert metrics_of(run) == metrics_of(other)


@pytest.mark.slow("trains against a clock of six seconds, and once more")
def test_a_run_that_broke_off_goes_on_to_the_steps_that_were_fixed(tmp_path: Path) -> None:
    def break_off(step: int) -> None:
        if step == 3:
            raise OSError("the disk went away")

    config = config_of(0.1, save_every=2)
    run = open_run(tmp_path / "run")
    with pytest.raises(OSError, match="went away"):
        finetune(config, run, Listening(break_off))
    before, steps = time_plan_of(run), plan_of(run).steps
    hooks = Listening()
    finetune(config, run, hooks, resume=True)
    after = time_plan_of(run)
    assert plan_of(run).steps == steps
    assert after.seconds_a_step == before.seconds_a_step
    assert 0 <= after.spent < after.began - before.began
    assert hooks.of_minutes() == []  # nothing is tried again

    plain = train_by_iterations(run, tmp_path / "plain", save_every=2)
    assert bytes_of(run) == bytes_of(plain)


def test_where_time_is_short_training_is_cut_in_time_for_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timed_training, "MAX_SECONDS_TRIED", 0.3)
    cut_after(monkeypatch, 5)
    run = open_run(tmp_path / "run")
    stopper = Stopper()
    with stopper.handling_signals(run):
        result = finetune(config_of(5), run, TerminalSteps(stopper))
    assert result.verdict is not None
    assert result.training is not None
    plan = plan_of(run)
    assert (result.training.step, result.training.ended) == (5, "time")
    cut = f"after step 5 of {plan.steps:,}"
    assert f"Training was cut {cut}" in str(plan.describe_ends(result.training))
    assert f"Training was cut {cut}" in describe_end(Run(run))  # as compare says it
    assert f"Training was cut {cut}" in list_figures(Run(run))[2]["how it ended"]
    report = run.report.read_text()
    assert f"Training was cut {cut}" in report
    assert "The run was resumed" not in report  # nobody did
    said = capsys.readouterr().err
    assert f"minutes: cut {cut}, so that there is time for the verdict" in said
    assert said.count(" tensors, ") == 3  # a line for the three tiers, once
    assert said.count("memory: ") == 1


@pytest.mark.slow("trains twice")
def test_a_run_that_was_cut_is_judged_again_and_goes_on_with_more_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timed_training, "MAX_SECONDS_TRIED", 0.3)
    run = open_run(tmp_path / "run")
    with monkeypatch.context() as patch:
        cut_after(patch, 5)
        patch.setattr(Forecast, "count_steps", lambda *_: 12)
        finetune(config_of(5), run)
    judged_again = finetune(config_of(5), run, resume=True)
    assert judged_again.training is not None
    assert (judged_again.training.step, plan_of(run).steps) == (5, 12)

    # In the longer time the run has as many steps as were planned for the shorter one
    monkeypatch.setattr(Forecast, "count_steps", lambda *_: 7)
    longer = finetune(config_of(6), run, resume=True)
    assert longer.training is not None
    assert (longer.training.step, longer.training.ended) == (12, "iterations")


@pytest.mark.slow("trains twice against a clock, 18 s")
def test_more_minutes_go_on_with_a_run_and_say_how_its_schedule_does(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    finetune(config_of(0.1), run)
    first = plan_of(run)
    hooks = Listening()
    result = finetune(config_of(0.3), run, hooks, resume=True)
    second, time_plan = plan_of(run), time_plan_of(run)
    assert result.training is not None
    assert result.training.step == second.steps > first.steps
    assert (time_plan.minutes, time_plan.spent > 0) == (0.3, True)
    said = hooks.of_minutes()[-1]
    assert f"from step {first.steps:,} on, on the schedule of {second.steps:,}" in said


def test_settings_are_the_same_whatever_iterations_the_minutes_came_to(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    prepare(config_of(None), run.path)
    digests = {
        settings_digest(
            config_of(minutes, iters=iterations), "base", run, read_dataset_record(run.dataset)
        )
        for minutes, iterations in ((5, 20), (5, 30), (6, 30), (None, 30))
    }
    assert len(digests) == 3


@pytest.mark.slow("trains")
def test_a_stop_that_a_person_asks_for_is_no_cut(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    with pytest.raises(TrainingStopped):
        finetune(config_of(0.1), run, Listening(lambda step: run.stop_request.touch()))
    assert not run.result.exists()


@pytest.mark.parametrize("by_file", [False, True])
def test_a_stop_in_the_step_after_which_a_run_would_be_cut_is_no_cut(
    by_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_after(monkeypatch, 5)
    run = RunDirectory(tmp_path / "run")
    write_time_plan(run, FIXED)
    if by_file:
        run.stop_request.touch()
    hooks = Listening()
    timed = timed_training.TimedTraining(RunInProgress(config_of(5), run, hooks))
    trainer = SimpleNamespace(current_step=5, steps=20, stop_requested=not by_file)
    timed._look(trainer)
    assert not hasattr(trainer, "is_out_of_time")
    assert hooks.said == []


@pytest.mark.parametrize(
    ("seconds", "left", "is_late"),
    [
        # 20 steps of 10 s and a verdict of 100 s were planned; 4 are done, and 16 left
        ([90, 10, 10, 10], 290, False),
        ([90, 10, 10, 10], 101, False),  # the run will be late, but there is time for a step
        ([90, 10, 10, 10], 99, True),
        ([90, 20, 20, 20], 199, True),  # the verdict is as slow
        ([90, 80, 80, 80], 210, False),  # but allowed twice its time alone
        ([90], 50, False),  # there is no speed before a second step
    ],
)
def test_a_run_is_cut_by_the_speed_of_its_last_steps(
    seconds: list[float], left: float, is_late: bool, monkeypatch
) -> None:
    monkeypatch.undo()
    seen = [(n + 1, sum(seconds[: n + 1])) for n in range(len(seconds))]
    assert timed_training.has_no_time_for_a_step(FIXED, seen, 20, left) is is_late


def test_a_run_that_ends_only_a_little_late_is_not_cut(monkeypatch) -> None:
    monkeypatch.undo()
    seen = [(17, 0.0), (18, 10.0)]  # of 20
    assert not timed_training.has_no_time_for_a_step(FIXED, seen, 20, 95)  # 25 s late
    assert timed_training.has_no_time_for_a_step(FIXED, seen, 20, 85)  # 35 s late


def write_time_plan(run: RunDirectory, plan: TimePlan) -> None:
    run.path.mkdir()
    write_plan(run.plan, training_plan(plan))


@pytest.mark.parametrize("ends", [["SIGKILL"], []])
def test_a_command_that_begins_again_by_itself_keeps_its_clock(
    ends: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timed_training, "list_earlier_ends", lambda: ends)
    run = RunDirectory(tmp_path / "run")
    write_time_plan(run, replace(FIXED, began=1_000.0, spent=20.0, worked=70.0))
    began, spent, _ = timed_training._find_time_spent(run)
    assert (spent, began == 1_000.0) == ((20.0, True) if ends else (90.0, False))


def test_a_run_notes_how_long_it_worked_and_a_copy_of_it_has_worked_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "run")
    write_time_plan(run, replace(FIXED, spent=20.0))
    timed = timed_training.TimedTraining(RunInProgress(config_of(5), run, Listening()))
    timed._began -= 70
    timed._look(SimpleNamespace(current_step=1, steps=20, stop_requested=False))
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))
    os.utime(copy.plan, (0, 0))
    for folder in (run, copy):
        _, spent, _ = timed_training._find_time_spent(folder)
        assert spent == pytest.approx(90.0, abs=5.0)
