"""A few steps of a run, tried in a folder that is thrown away: how long they take here and now."""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core.backend import device
from nested_core.config.loading import render_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import TrainingStopped
from nested_core.models.session import Session
from nested_core.pipeline import steps
from nested_core.pipeline.device_lock import OnWait
from nested_core.pipeline.processes import count_processes
from nested_core.records.plan import TrainingPlan, read_plan
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.stages import receiving_stages

MOST_STEPS = 5_000
MOST_STEPS_IN_RANKS = 12  # which do not tell how long they take; or until the slowest tier is due


@dataclass(frozen=True, kw_only=True)
class TriedStep:
    """An optimizer step that was tried: its seconds, and the tokens that it was trained on."""

    seconds: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """What was measured of a run of a few steps.

    opening: seconds until the first step: the data is read and the trainer made.
    tried: the steps; the first one, in which functions are compiled, among them.
    checkpoint: seconds of one on the way; those of the closing, where one step was tried.
    closing: seconds after the last step: a checkpoint is written and the adapter selected.
    plan: what the run set out to do.
    """

    opening: float
    tried: tuple[TriedStep, ...]
    checkpoint: float
    closing: float
    plan: TrainingPlan

    @property
    def measured(self) -> tuple[TriedStep, ...]:
        """The steps that tell the speed: all but the first, where there are others."""
        return self.tried[1:] or self.tried


def try_steps(
    config: FineTuneConfig,
    run: RunDirectory,
    seconds: float,
    session: Session | None = None,
    on_wait: OnWait | None = None,
) -> TrialRun:
    """Train a few steps of a run that is validated and loaded; nothing of it is changed.

    After so many seconds no further step is begun, but the second one: that is left out on a CPU
    where the first one took twice as long and no compiler ran in it. The steps are thrown away,
    with the state of the optimizer and of the random numbers: what the run trains later is what it
    would have trained without them.
    """
    every = config.grad_accumulation_steps
    most = MOST_STEPS if count_processes(config) == 1 else MOST_STEPS_IN_RANKS
    iterations = max(most, config.nested.frequencies[-1]) * every
    alone = {"epochs": None, "early_stop_patience": None, "evaluate_tasks": (), "select_by": "loss"}
    short = config.model_copy(
        update={
            "iters": iterations,
            "steps_per_report": every,
            "val_batches": 0,
            "save_every": every,
            "adapter_path": None,
            "report_to": None,
            "samples": (),
            "training": config.training.model_copy(update=alone | {"minutes": None}),
        }
    )
    with tempfile.TemporaryDirectory(prefix="nested-tune-") as folder:
        trial = RunDirectory(Path(folder) / "run")
        trial.path.mkdir()
        for file in (run.dataset, run.tiers, run.start, run.replay, run.replayed_rows):
            if file.exists():
                shutil.copyfile(file, trial.path / file.name)
        shutil.copytree(run.initial, trial.initial)
        trial.config.write_bytes(render_config(short))
        clock = _Clock(every, seconds)
        with (
            trial.locked(),
            warnings.catch_warnings(action="ignore"),
            receiving_stages(lambda _: None),  # which the run itself says
            suppress(TrainingStopped),
        ):
            steps.train(short, trial, clock, clock.watch, on_wait, session=session)
        ended = time.monotonic()
        plan = read_plan(trial.plan)
    if plan is None:
        raise RuntimeError("the trial run has no plan.json")
    closing = ended - clock.last_report
    later = clock.tried[1:]
    pauses = clock.last_report - clock.first_report - sum(step.seconds for step in later)
    return TrialRun(
        opening=clock.first_report - clock.began - clock.tried[0].seconds,
        tried=tuple(clock.tried),
        checkpoint=max(0.0, pauses) / len(later) if later else closing,
        closing=closing,
        plan=plan,
    )


class _Clock:
    """mlx-lm's callback protocol: times each step, and ends training when it has taken long."""

    def __init__(self, iterations_a_step: int, seconds: float) -> None:
        self._seconds = seconds
        self.began = time.monotonic()
        self.first_report = self.last_report = self.began
        self.tried: list[TriedStep] = []
        self._iterations = iterations_a_step
        self._tokens = 0
        self._trainer: Any = None
        self._first_step = self.began
        self._compiling = 0.0

    def watch(self, trainer: Any) -> None:
        """Look at the clock after each step, which several processes do not tell of."""
        self._trainer = trainer
        trainer.on_step = self._after_step
        self._first_step = time.monotonic()
        self._compiling = _compiling_seconds()

    def _after_step(self, step: int, _: int) -> None:
        taken = time.monotonic() - self._first_step
        # The first step tells how long a step takes if nothing was compiled in it
        tells = step > 1 or (device() == "cpu" and _compiling_seconds() == self._compiling)
        if tells and taken > (self._seconds if step > 1 else 2 * self._seconds):
            self._trainer.stop_training()

    def on_train_loss_report(self, train_info: Mapping[str, Any]) -> None:
        """The report of a step."""
        self.last_report = time.monotonic()
        if not self.tried:
            self.first_report = self.last_report
        tokens = train_info["trained_tokens"]
        seconds = self._iterations / train_info["iterations_per_second"]
        self.tried.append(TriedStep(seconds=seconds, tokens=tokens - self._tokens))
        self._tokens = tokens

    def on_val_loss_report(self, val_info: Mapping[str, Any]) -> None:
        """There is no evaluation."""


def _compiling_seconds() -> float:
    """Processor seconds of this process's children that have ended: compilers of kernels."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime
