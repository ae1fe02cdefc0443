"""A run of `training.minutes`: the steps that fit are counted once, and cut if time runs out.

A few steps are tried and thrown away before the first one. What fits with the verdict is written
into config.yaml, as iterations, and with it into plan.json: the run is that of `--iters`, to the
bit, and is resumed as any other. After each step it looks at the clock: if there is no time for
another step and the verdict, training ends, as by early stopping. Nothing ends a verdict: if it
takes longer than forecast, the command does.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any, Self

from nested_core.config.loading import render_config
from nested_core.errors import ConfigError
from nested_core.models.session import Session
from nested_core.pipeline.run_in_progress import AroundRun, RunInProgress
from nested_core.process.command_parent import STARTED, has_parent, list_earlier_ends
from nested_core.records.plan import TimePlan, read_plan, write_plan
from nested_core.records.result import TrainResult
from nested_core.rooms.minutes.blas_threads import (
    THREADS_VARIABLE,
    choose_blas_threads_of_run,
    using_blas_threads,
)
from nested_core.rooms.minutes.forecast import measure
from nested_core.storage.atomic import write_bytes
from nested_core.storage.checkpoint_verification import latest_state
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.duration_format import format_clock, format_duration
from nested_core.text.value_format import format_count, format_passes

SHARE_TRIED = 0.05  # of the minutes, in which steps are tried
MAX_SECONDS_TRIED = 15.0
SHARE_BEYOND = 0.1  # of the minutes: a run that ends so much later is not cut for it
MAX_SECONDS_BEYOND = 30.0
MAX_PACE = 2.0  # times as slow as forecast, that is allowed for the verdict: nothing stops that
VERDICT_SPARED = 0.4  # of its forecast, where a run is refused: answers may be shorter, or known
STEPS_MEASURED = 20  # the last ones, by which a machine is slower or quicker
SECONDS_BETWEEN_NOTES = 5.0


def holding_to_minutes(work: RunInProgress) -> AbstractContextManager[object]:
    """Return a context in which a run with `training.minutes` trains as many steps as fit."""
    return nullcontext() if work.config.training.minutes is None else TimedTraining(work)


class TimedTraining(ExitStack):
    """Trains a run with `training.minutes`: as many steps as fit, cut if they turn out slower.

    A run that was stopped and resumed is one run of several commands; each makes one of these. The
    configuration of the run gets its iterations as soon as they are counted.
    """

    def __init__(self, work: RunInProgress) -> None:
        super().__init__()
        self._work = work
        self._minutes = work.config.training.minutes or 0.0  # never None here
        self._run = run = work.run
        self._hooks = work.steps
        self._began, self._spent, self._plan = _find_time_spent(run)
        plan = read_plan(run.plan)
        if plan is not None and self._plan is not None and self._plan.minutes == self._minutes:
            work.config = work.config.model_copy(update={"iters": plan.iterations})
        work.train = self.train
        self._seen: deque[tuple[int, float]] = deque(maxlen=STEPS_MEASURED)
        self._noted = 0.0

    def __enter__(self) -> Self:
        if self._plan is not None:
            self.enter_context(using_blas_threads(self._plan.blas_threads))
        return self

    def train(self) -> TrainResult:
        """Train as many steps as fit; the run's configuration says how many.

        Raises ConfigError if there is no time for a step and the verdict.
        """
        plan, session = self._plan, self._work.session
        if plan is None or plan.minutes != self._minutes:
            plan = self._count_steps(session)
        self._plan = replace(plan, began=self._began, spent=self._spent, worked=0.0)
        session.after_step = self._look
        session.time_plan = self._plan
        return self._work.train_once()

    @property
    def _end(self) -> float:
        """When the minutes are over, in seconds since 1970."""
        return self._began + 60 * self._minutes - self._spent

    def _count_steps(self, session: Session) -> TimePlan:
        """Count the steps that fit, by trying a few; return their plan.

        Writes the number into the run's configuration, and shows a message. Raises ConfigError if
        no step fits.
        """
        self._hooks.on_message("minutes: trying a few steps, which are thrown away")
        if session.await_kernels is not None:
            session.await_kernels(self._run.stop_request.exists)
        threads = None if self._plan is None else self._plan.blas_threads
        if self._plan is None:
            threads = choose_blas_threads_of_run(self._work.config, session, self._hooks.on_message)
            self.enter_context(using_blas_threads(threads))
        tried = min(SHARE_TRIED * 60 * self._minutes, MAX_SECONDS_TRIED)
        forecast = measure(self._work.config, self._run, tried, session, self._hooks.on_message)
        done = int(latest_state(self._run.checkpoints).get("step", 0))
        left = self._end - time.time()
        least = max(1, self._work.config.nested.frequencies[-1] - done)
        steps = max(least, forecast.count_steps(left))
        needed = forecast.seconds_of(steps) - VERDICT_SPARED * forecast.verdict
        missing = needed - left - _seconds_beyond(self._minutes)
        if steps == least and missing > 0:
            raise ConfigError(
                f"training.minutes: {self._minutes:g} minutes hold no step and its verdict on this "
                f"machine, as busy as it is: {format_clock(time.time() - self._began)} are over, a "
                f"step takes {format_clock(forecast.trial.step)}, and the verdict about "
                f"{format_duration(forecast.verdict)}. Give --minutes "
                f"{math.ceil(self._minutes + missing / 60)} or more, or a smaller batch_size, "
                f"training.sample_tokens or fewer questions of gate.tasks."
            )
        self._write_steps(done + steps)
        passes = format_passes(forecast.trial.passes_of_a_step * (done + steps))
        in_threads = "" if threads is None else f" with {THREADS_VARIABLE}={threads}"
        goes_on = f" from step {done:,} on, on the schedule of {done + steps:,}" if done else ""
        self._hooks.on_message(
            f"minutes: {format_count(steps, 'step')} in {self._minutes:g} minutes{in_threads}"
            f"{goes_on}, {passes} over the training data: {forecast.trial.step:.2g} s a step, and "
            f"the verdict about {format_duration(forecast.verdict)}"
        )
        return TimePlan(
            minutes=self._minutes,
            seconds_a_step=forecast.seconds_between(steps) / steps,
            seconds_to_judge=forecast.evaluation + forecast.trial.checkpoint + forecast.verdict,
            began=self._began,
            spent=self._spent,
            blas_threads=threads,
        )

    def _look(self, trainer: Any) -> None:
        """End training after a step if there is no time for another one and the verdict."""
        plan, now, done = self._plan, time.time(), trainer.current_step
        if plan is None or done >= trainer.steps:
            return
        if trainer.stop_requested or self._run.stop_request.exists():
            return  # a person stopped the run
        self._note_time(now)
        self._seen.append((done, now))
        is_late = has_no_time_for_a_step(plan, self._seen, trainer.steps, self._end - now)
        if is_late and done >= self._work.config.nested.frequencies[-1]:
            self._hooks.on_message(
                f"minutes: cut after step {done:,} of {trainer.steps:,}, so that there is time for "
                f"the verdict"
            )
            trainer.is_out_of_time = True

    def _note_time(self, now: float) -> None:
        """Write to plan.json how long this command has worked, if seconds have passed."""
        if now - self._noted < SECONDS_BETWEEN_NOTES:
            return
        self._noted = now
        plan = read_plan(self._run.plan)
        if plan is not None and plan.time is not None:
            noted = replace(plan.time, worked=now - self._began)
            write_plan(self._run.plan, replace(plan, time=noted))

    def _write_steps(self, steps: int) -> None:
        """Set the number of steps in the configuration, in memory and in config.yaml.

        The file keeps its modification time, which is when the run began.
        """
        iterations = steps * self._work.config.grad_accumulation_steps
        training = self._work.config.training.model_copy(update={"epochs": None})
        self._work.config = self._work.config.model_copy(
            update={"iters": iterations, "training": training}
        )
        begun = self._run.config.stat()
        write_bytes(self._run.config, render_config(self._work.config))
        os.utime(self._run.config, ns=(begun.st_atime_ns, begun.st_mtime_ns))


def has_no_time_for_a_step(
    plan: TimePlan, seen: Sequence[tuple[int, float]], steps: int, left: float
) -> bool:
    """Return whether a run is to be cut: it would end late, and only the verdict still fits.

    If steps take longer than planned, the verdict is expected to take longer by the same factor.

    Args:
        plan: the plan by which the steps were counted.
        seen: the last steps, with the time at the end of each.
        steps: the number of steps of the whole run.
        left: seconds until the minutes are over.
    """
    (first, began), (done, now) = seen[0], seen[-1]
    if done == first:  # one step shows no pace: functions may have been compiled in it
        return False
    step = (now - began) / (done - first)
    left -= min(step / plan.seconds_a_step, MAX_PACE) * plan.seconds_to_judge
    return left <= 0 and (steps - done) * step - left > _seconds_beyond(plan.minutes)


def _seconds_beyond(minutes: float) -> float:
    """Return the seconds after its minutes in which a run may end without being cut."""
    return min(SHARE_BEYOND * 60 * minutes, MAX_SECONDS_BEYOND)


def _find_time_spent(run: RunDirectory) -> tuple[float, float, TimePlan | None]:
    """Return when this command began, the seconds of earlier commands on the run, and their plan.

    The plan is None without an earlier command. A command whose process was killed and started
    again began when its first process did.
    """
    plan = read_plan(run.plan)
    planned = None if plan is None else plan.time
    began = STARTED if has_parent() else time.time()
    if planned is None:
        return began, 0.0, None
    if list_earlier_ends():
        return planned.began, planned.spent, planned
    return began, planned.spent + planned.worked, planned


AROUND = AroundRun(run=holding_to_minutes)
