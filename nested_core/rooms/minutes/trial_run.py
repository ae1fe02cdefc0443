"""Trains a few steps of a run in a temporary folder, to measure how long they take."""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core.config.loading import render_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import TrainingStopped
from nested_core.models.session import Session
from nested_core.pipeline import steps
from nested_core.pipeline.device_lock import OnWait
from nested_core.pipeline.processes import count_processes
from nested_core.records.plan import read_plan
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.stages import receiving_stages

MOST_STEPS = 5_000
SLOW_FIRST_STEP = 30.0  # seconds
MOST_STEPS_IN_RANKS = 12  # which do not tell how long they take; or until the slowest tier is due


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """What was measured of a run of a few steps.

    opening: seconds until the end of the first step, in which functions are compiled; until its
        begin if there was only one.
    step: seconds of a step.
    tokens_per_second: trained-on tokens.
    checkpoint: seconds after the last step, to write a checkpoint and select the adapter.
    rows_to_begin: rows that the loss of the run computes before its first step.
    passes_of_a_step: passes over the training data that a step makes, such as 0.01.
    """

    opening: float
    step: float
    tokens_per_second: float
    checkpoint: float
    rows_to_begin: int
    passes_of_a_step: float


def try_steps(
    config: FineTuneConfig,
    run: RunDirectory,
    seconds: float,
    session: Session | None = None,
    on_wait: OnWait | None = None,
) -> TrialRun:
    """Train a few steps of a copy of a run, and return how long they took.

    The run must be validated and loaded. Its directory is not changed: the copy trains in a
    temporary folder that is removed, and the run trains later as it would have without this.

    seconds: no step begins after this time. The second step is an exception, since the first one
        compiles functions and measures nothing: it is left out only if the first one took more
        than SLOW_FIRST_STEP.
    """
    accumulation = config.grad_accumulation_steps
    max_steps = MOST_STEPS if count_processes(config) == 1 else MOST_STEPS_IN_RANKS
    unset = {"epochs": None, "early_stop_patience": None, "evaluate_tasks": (), "select_by": "loss"}
    short = config.model_copy(
        update={
            "iters": max(max_steps, config.nested.frequencies[-1]) * accumulation,
            "steps_per_report": accumulation,
            "val_batches": 0,
            "save_every": MOST_STEPS * accumulation,  # no checkpoint but the last
            "adapter_path": None,
            "report_to": None,
            "samples": (),
            "training": config.training.model_copy(update=unset | {"minutes": None}),
        }
    )
    with tempfile.TemporaryDirectory(prefix="nested-tune-") as folder:
        trial = RunDirectory(Path(folder) / "run")
        trial.path.mkdir()
        trial.trial_mark.touch()
        for file in (run.dataset, run.tiers, run.start, run.replay, run.replayed_rows):
            if file.exists():
                shutil.copyfile(file, trial.path / file.name)
        shutil.copytree(run.initial, trial.initial)
        trial.config.write_bytes(render_config(short))
        clock = _Clock(accumulation, seconds)
        with (
            trial.locked(),
            warnings.catch_warnings(action="ignore"),
            receiving_stages(lambda _: None),  # messages: the run itself will show them
            suppress(TrainingStopped),
        ):
            steps.train(short, trial, clock, clock.watch, on_wait, session=session)
        ended = time.monotonic()
        plan = read_plan(trial.plan)
    if plan is None:
        raise RuntimeError("the trial run has no plan.json")
    measured = clock.seconds[1:] or clock.seconds  # the first step compiles functions
    step = sum(measured) / len(measured)
    return TrialRun(
        opening=max(0.0, clock.last_report - clock.began - sum(measured)),
        step=step,
        tokens_per_second=clock.tokens / sum(clock.seconds),
        checkpoint=ended - clock.last_report,
        rows_to_begin=clock.rows_to_begin,
        passes_of_a_step=plan.epochs / plan.steps,
    )


class _Clock:
    """mlx-lm's callback protocol: times each step, and ends training when it has taken long."""

    def __init__(self, iterations_a_step: int, seconds: float) -> None:
        self.began = self.last_report = time.monotonic()
        self.seconds: list[float] = []  # of each step
        self.tokens = 0
        self.rows_to_begin = 0
        self._most_seconds = seconds
        self._iterations = iterations_a_step
        self._first_step = self.began

    def watch(self, trainer: Any) -> None:
        """Have the trainer call `_after_step` after each step, and note when its first one begins.

        With several processes that call does not come.
        """
        self.rows_to_begin = trainer.setup.loss_fn.rows_to_begin
        trainer.after_step = self._after_step
        self._first_step = time.monotonic()

    def _after_step(self, trainer: Any) -> None:
        """Stop the trainer if its time is over."""
        taken = time.monotonic() - self._first_step
        if taken > (self._most_seconds if trainer.current_step > 1 else SLOW_FIRST_STEP):
            trainer.stop_training()

    def on_train_loss_report(self, train_info: Mapping[str, Any]) -> None:
        """Take the report of a step."""
        self.last_report = time.monotonic()
        self.tokens = train_info["trained_tokens"]
        self.seconds.append(self._iterations / train_info["iterations_per_second"])

    def on_val_loss_report(self, val_info: Mapping[str, Any]) -> None:
        """Do nothing: there is no evaluation."""
