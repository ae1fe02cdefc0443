"""`training.minutes`: the steps that fit are fixed once, and the run ends when its time is over."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flows.commands.terminal_hooks import TerminalSteps
from flows.process.stop_signals import Stopper
from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import TrainingStopped
from nested_core.models.session import Session
from nested_core.pipeline.continual import settings_digest
from nested_core.pipeline.finetune import finetune
from nested_core.pipeline.hooks import Steps
from nested_core.records.dataset import read_dataset_record
from nested_core.records.metrics import append_metrics, read_metrics
from nested_core.records.plan import TimePlan, TrainingPlan, read_plan, write_plan
from nested_core.records.verdict import Verdict
from nested_core.rooms.minutes import timed_training
from nested_core.rooms.minutes.blas_threads import using_blas_threads
from nested_core.storage.run_directory import RunDirectory, open_run
from nested_core.text.stages import receiving_stages
from tests.example import SPEEDS, example_config, prepare, write_config
from tests.flows.conftest import ended, start
from tests.waiting import wait_until

# A run of some seconds, with warm-up, cosine and evaluations by shares of the run.
SETTINGS: dict[str, Any] = {
    "steps_per_report": 0.05,
    "steps_per_eval": 0.25,
    "save_every": 0.25,
    "training": {"warmup_steps": 0.1, "decay": "cosine"},
}


FIXED = TimePlan(
    minutes=5,
    steps=20,
    seconds_a_step=10,
    seconds_to_begin=10,
    seconds_to_judge=100,
    began=0,
    spent=0,
)


def training_plan(time_plan: TimePlan) -> TrainingPlan:
    return TrainingPlan(
        steps=time_plan.steps,
        iterations=time_plan.steps,
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
    fixed = time_plan_of(run)
    again = open_run(path)
    with using_blas_threads(fixed.blas_threads):
        finetune(config_of(None, iters=fixed.steps, **changes), again)
    return again


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run is refused, or stopped, because the machine of the tests is busy."""
    monkeypatch.setattr(timed_training, "MINUTES_BEYOND", 60.0)


def set_end(seconds: float) -> None:
    """Have the run that goes on be over in so many seconds."""
    (clock,) = (thread for thread in threading.enumerate() if thread.name == "minutes")
    cast(Any, clock).end = time.time() + seconds


def leave_too_little_time(run: RunDirectory) -> None:
    """Have the run be over before it could stop and be judged."""
    fixed = time_plan_of(run)
    needed = fixed.seconds_a_step + fixed.seconds_to_begin + fixed.seconds_to_judge
    set_end(timed_training.SECONDS_TO_STOP + 0.9 * needed)


@pytest.mark.slow("trains twice")
def test_a_run_of_minutes_is_that_of_as_many_iterations_bit_for_bit(tmp_path: Path) -> None:
    hooks = Listening()
    run = open_run(tmp_path / "minutes")
    result = finetune(config_of(0.1), run, hooks)
    steps = time_plan_of(run).steps
    assert result.training is not None
    assert result.training.step == steps == plan_of(run).steps >= 4
    assert read_run_config(run).iters == steps
    assert f"{steps:,} steps fit in 0.1 minutes" in hooks.of_minutes()[-1]
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
    before = time_plan_of(run)
    hooks = Listening()
    finetune(config, run, hooks, resume=True)
    after = time_plan_of(run)
    assert (after.steps, plan_of(run).steps) == (before.steps, before.steps)
    assert after.seconds_a_step == before.seconds_a_step
    assert 0 < after.spent < after.began - before.began
    assert hooks.of_minutes() == []  # nothing is tried again

    plain = train_by_iterations(run, tmp_path / "plain", save_every=2)
    assert bytes_of(run) == bytes_of(plain)


@pytest.mark.slow("trains against the clock, and judges")
def test_where_time_is_short_training_is_cut_in_time_for_the_verdict(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(timed_training, "MAX_SECONDS_TRIED", 0.3)
    run = open_run(tmp_path / "run")

    class Hurried(Listening):
        """Has the time be over soon, until training is cut."""

        def on_step(self, step: int, steps: int) -> None:
            """Leave too little time for the stop and the verdict after it."""
            if step == 3:
                leave_too_little_time(run)

        def on_message(self, message: str) -> None:
            """Give the verdict all the time that it takes on a busy machine."""
            super().on_message(message)
            begun.append(run.config.stat().st_mtime_ns)  # what `runs` counts minutes from
            if message.startswith("minutes: cut"):
                set_end(600)

    begun: list[int] = []
    stages_said: list[str] = []
    hooks = Hurried()
    with receiving_stages(stages_said.append):
        result = finetune(config_of(5), run, hooks)
    assert result.verdict is not None
    assert result.training is not None
    assert {*begun} == {run.config.stat().st_mtime_ns}
    assert len([stage for stage in stages_said if stage.startswith("layers: ")]) == 1
    plan, fixed = plan_of(run), time_plan_of(run)
    assert 3 <= plan.steps == result.training.step < fixed.steps
    assert hooks.of_minutes()[-1] == (
        f"minutes: cut after step {plan.steps:,} of {fixed.steps:,}, so that there is time for the "
        f"verdict"
    )
    said = f"Training was cut after step {plan.steps:,} of {fixed.steps:,}"
    assert said in str(plan.describe_ends(None))
    assert said in run.report.read_text()
    assert not run.stop_request.exists()

    again = Listening()
    finetune(config_of(5), run, again, resume=True)  # it is trained: there is only to judge
    assert again.of_minutes() == []
    assert plan_of(run).steps == plan.steps


def test_a_run_that_is_cut_says_once_what_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timed_training, "MAX_SECONDS_TRIED", 0.3)
    run = open_run(tmp_path / "run")
    stopper = Stopper()

    class HurriedTerminal(TerminalSteps):
        """What `train` shows, where the time is over soon."""

        def on_training_start(self, trainer: Any) -> None:
            """Leave too little time from the third step on."""
            super().on_training_start(trainer)
            trainer.on_step = lambda step, steps: leave_too_little_time(run) if step == 3 else None

        def on_message(self, message: str) -> None:
            """Give the verdict all the time that it takes on a busy machine."""
            super().on_message(message)
            if message.startswith("minutes: cut"):
                set_end(600)

    with stopper.handling_signals(run):
        finetune(config_of(5), run, HurriedTerminal(stopper))
    said = capsys.readouterr().err
    assert "minutes: cut after step" in said
    assert said.count(" tensors, ") == 3  # a line for the three tiers
    assert said.count("memory: ") == 1


@pytest.mark.slow("trains, and judges twice")
def test_a_verdict_that_takes_too_long_is_stopped_and_given_when_the_run_goes_on(tmp_path) -> None:
    class SlowVerdict(Listening):
        """A gate that takes longer than there is time."""

        def judge(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> Verdict:
            """Wait first."""
            set_end(timed_training.SECONDS_TO_STOP)
            time.sleep(600)
            return super().judge(config, run, session)

    hooks = SlowVerdict()
    run = open_run(tmp_path / "run")
    with (
        pytest.raises(TrainingStopped, match="before there was a verdict: the trained adapter is"),
        Stopper().handling_signals(run),
    ):
        finetune(config_of(0.1), run, hooks)
    assert hooks.of_minutes()[-1] == "minutes: the time is over, and a minute more: stopping"
    assert not run.stop_request.exists()
    assert not run.gate.exists()
    result = finetune(config_of(0.1), run, resume=True)
    assert result.verdict is not None


@pytest.mark.slow("trains twice against a clock, 18 s")
def test_more_minutes_go_on_with_a_run_and_say_how_its_schedule_does(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    finetune(config_of(0.1), run)
    first = time_plan_of(run)
    hooks = Listening()
    result = finetune(config_of(0.3), run, hooks, resume=True)
    second = time_plan_of(run)
    assert result.training is not None
    assert result.training.step == second.steps > first.steps
    assert (second.minutes, second.spent > 0) == (0.3, True)
    said = hooks.of_minutes()[-1]
    where = f"The run goes on from step {first.steps:,}, on the schedule of {second.steps:,} steps"
    assert f"{where}: the learning rate was 0.0002, and is 0.0" in said


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
    assert plan_of(run).steps == time_plan_of(run).steps
    assert not run.result.exists()


@pytest.mark.parametrize(
    ("seconds", "left", "is_cut"),
    [
        ([10], 136, False),  # 10 + 10 + 100 + 15 s
        ([10], 134, True),
        ([20], 271, False),
        ([20], 269, True),
        ([500, 10, 10, 10, 20], 170, False),  # the last four steps took 12.5 s on average
        ([500, 10, 10, 10, 20], 167, True),
    ],
)
def test_the_cut_leaves_a_reserve_for_the_verdict_and_more_on_a_slower_machine(
    seconds: list[float],
    left: float,
    is_cut: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = open_run(tmp_path / "run")
    run.path.mkdir()
    now = [1_000_000.0]
    monkeypatch.setattr(timed_training, "time", SimpleNamespace(time=lambda: now[0]))
    end = now[0] + sum([90, *seconds]) + left + timed_training.SECONDS_TO_STOP
    clock = timed_training._Clock(run, end, print)
    with clock.watching_training(FIXED):
        for step, took in enumerate([0, 90, *seconds]):  # functions are compiled in the first one
            now[0] += took
            append_metrics(run.metrics, {"step": step, "val_loss": 1.0})
            os.utime(run.metrics, (now[0] + 1e-3, now[0] + 1e-3))
            clock._note_report()
        assert clock._must_cut(FIXED) is is_cut
        nearly_done = replace(FIXED, steps=len(seconds) + 2)
        assert not clock._must_cut(nearly_done)  # its last step takes no longer than to stop


def test_nothing_is_cut_before_there_is_a_step_to_judge(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.path.mkdir()
    clock = timed_training._Clock(run, time.time() + 1, print)
    with clock.watching_training(FIXED):
        clock._note_report()
        assert not clock._must_cut(FIXED)
        append_metrics(run.metrics, {"step": 0, "val_loss": 1.0})  # the first step is under way
        os.utime(run.metrics, (time.time() + 1, time.time() + 1))
        clock._note_report()
        assert clock._must_cut(FIXED)


@pytest.mark.parametrize("ends", [["SIGKILL"], []])
def test_a_command_that_begins_again_by_itself_keeps_its_clock(
    ends: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timed_training, "MINUTES_BEYOND", 1.0)
    monkeypatch.setattr(timed_training, "list_earlier_ends", lambda: ends)
    run = open_run(tmp_path / "run")
    run.path.mkdir()
    began = time.time() - 300
    plan = replace(FIXED, began=began)
    write_plan(run.plan, training_plan(plan))
    timed = timed_training.TimedTraining(config_of(5), run, Listening())
    timed._go_on(plan)
    if ends:
        assert timed._clock.end == began + 60 * (5 + 1)
    else:  # a person's --resume gets the verdict
        assert timed._clock.end >= time.time() + plan.seconds_to_judge
        timed._clock.end = 0.0
        timed._clock.start()
        time.sleep(2 * timed_training.SECONDS_BETWEEN_LOOKS)
        timed._clock.finish()
        assert not timed._clock._has_asked


def test_the_time_of_a_killed_command_counts_until_its_clock_looked_last(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.path.mkdir()
    write_plan(run.plan, training_plan(replace(FIXED, began=1_000.0, spent=20.0)))
    os.utime(run.plan, (1_000.0, 1_000.0))
    clock = timed_training._Clock(run, time.time() + 600, print)
    clock.start()
    wait_until(lambda: run.plan.stat().st_mtime > 1_000)
    clock.finish()
    os.utime(run.plan, (1_070.0, 1_070.0))
    _, spent, is_begun_again = timed_training._find_time_spent(run)
    assert (spent, is_begun_again) == (90.0, False)


@pytest.mark.slow("trains in a process of its own that is killed")
def test_a_killed_command_of_minutes_ends_with_the_bytes_of_one_that_nobody_killed(
    tmp_path: Path,
) -> None:
    training = {**SETTINGS["training"], "minutes": 1}
    write_config(tmp_path / "config.yaml", **{**SETTINGS, "training": training, "save_every": 3})
    process = start("train", "-c", "config.yaml", "--run-dir", "killed", cwd=tmp_path)
    run = RunDirectory(tmp_path / "killed")
    wait_until(lambda: any(run.checkpoints.glob("step-*/MANIFEST.json")), process=process)
    began = time_plan_of(run).began
    (trains,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(trains), signal.SIGKILL)
    killed = ended(process)
    assert killed.code == 0, killed.stderr
    fixed = time_plan_of(run)
    assert (fixed.began, fixed.spent) == (began, 0.0)  # one command, whose clock went on
    plain = train_by_iterations(run, tmp_path / "plain", save_every=3)
    assert bytes_of(run) == bytes_of(plain)
