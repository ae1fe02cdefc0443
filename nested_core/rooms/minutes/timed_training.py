"""A run of `training.minutes`: its steps are fixed once, and it ends when its time is over.

A few steps are tried and thrown away before the first one. What fits is written into config.yaml,
as iterations, before the first step, and with it into plan.json: the run is that of `--iters`, to
the bit, and is resumed as any other. A thread looks at the clock. Where the machine has become
slower, it asks for a stop in time for the verdict, and the run ends with the steps that it has; a
minute after its time it asks for a stop whatever is done.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace

import mlx.core as mx

from nested_core.backend import to_float
from nested_core.config.loading import render_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError, DamagedError, TrainingStopped
from nested_core.models.session import Session
from nested_core.optim.learning_rate_schedules import build_learning_rate
from nested_core.pipeline.device_lock import locking_devices
from nested_core.pipeline.hooks import Steps
from nested_core.process.command_parent import STARTED, has_parent, list_earlier_ends
from nested_core.records.dataset import read_dataset_record
from nested_core.records.metrics import read_latest_values
from nested_core.records.plan import TimePlan, read_plan
from nested_core.records.result import TrainResult
from nested_core.rooms.minutes.blas_threads import (
    THREADS_VARIABLE,
    choose_blas_threads_of_run,
    using_blas_threads,
)
from nested_core.rooms.minutes.forecast import Forecast, make_forecast
from nested_core.rooms.minutes.trial_run import TrialRun, try_steps
from nested_core.storage.atomic import write_bytes
from nested_core.storage.checkpoint_verification import latest_state
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.duration_format import format_clock
from nested_core.text.stages import receiving_stages
from nested_core.text.value_format import format_count, format_passes

SHARE_TRIED = 0.05  # of the minutes, in which steps are tried
MAX_SECONDS_TRIED = 15.0
SHARE_BEYOND = 0.12  # of the minutes, aimed at beyond them: forecasts of verdicts are rather long
MAX_SECONDS_BEYOND = 36.0
VERDICT_SPARED = 0.4  # of its forecast, where a run is refused: it took 0.5 to 0.9 of it
MINUTES_BEYOND = 1.0  # then everything is stopped
SECONDS_TO_STOP = 7.0  # what a command takes to end after it was asked
SECONDS_BETWEEN_LOOKS = 0.25
MOST_PASSES = 20  # over the training data; more hardly help
MAX_SLOWDOWN = 8.0  # of the machine since the steps were fixed, that is allowed for
SHARE_RESERVED = 0.2  # of the verdict's time, where training is cut for it
REPORTS_COUNTED = 4  # the last ones, by which the machine is slower: it may stand still for seconds
MAX_SECONDS_RESERVED = 15.0  # fewer than lie between what is aimed at and the end


class TimedTraining(AbstractContextManager["TimedTraining"]):
    """Holds one command to the minutes of its run, from begin to end of the block.

    Attributes:
        config: the configuration, with the iterations of the run as soon as they are fixed.
    """

    def __init__(self, config: FineTuneConfig, run: RunDirectory, hooks: Steps) -> None:
        training = config.training
        minutes = training.minutes or 0.0  # with none this is not made
        self._minutes = minutes
        self._run = run
        self._hooks = hooks
        self._began, self._spent, self._is_begun_again = _find_time_spent(run)
        end = self._end_at(60 * (minutes + MINUTES_BEYOND))
        self._clock = _Clock(run, end, hooks.on_message)

        # The iterations of a run that was begun with these minutes are fixed, and in any case the
        # number of threads
        self.config = config
        plan = read_plan(run.plan)
        self._earlier = None if plan is None else plan.time
        self._fixed: TimePlan | None = None
        if plan is not None and plan.time is not None and plan.time.minutes == minutes:
            self._fixed = plan.time
            self.config = config.model_copy(update={"iters": plan.iterations})
        self._threads = ExitStack()

    def __enter__(self) -> TimedTraining:
        if self._earlier is not None:
            self._threads.enter_context(using_blas_threads(self._earlier.blas_threads))
        if self._fixed is None or not self._run.result.exists():  # else there is only to judge
            self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._clock.finish()
        self._threads.close()

    def train(self, session: Session) -> TrainResult:
        """Train as many steps as fit, or as are left of them; `config` says how many.

        Raises ConfigError where there is no time for a step and the verdict, and TrainingStopped
        where somebody else asked for a stop, or time was over before the first step.
        """
        plan = self._fix_steps(session) if self._fixed is None else self._go_on(self._fixed)
        session.time_plan = plan
        try:
            with self._clock.watching_training(plan):
                return self._hooks.train(self.config, self._run, session)
        except TrainingStopped:
            state = latest_state(self._run.checkpoints)
            if not self._clock.has_cut or not state:
                raise
        self._write_iterations(state["iteration"])
        self._hooks.on_message(
            f"minutes: cut after step {state['step']:,} of {plan.steps:,}, so that there is time "
            f"for the verdict"
        )
        with receiving_stages(lambda _: None):  # what began is said already
            return self._hooks.train(self.config, self._run, session)

    def _go_on(self, fixed: TimePlan) -> TimePlan:
        """The plan of a run that goes on.

        A person who resumes it gets the verdict in any case. A command that was killed and begins
        again by itself keeps its clock.
        """
        if not self._is_begun_again:
            self._clock.stops_verdict = False
            least = 2 * fixed.seconds_to_begin + fixed.seconds_to_judge + 60 * MINUTES_BEYOND
            self._clock.end = max(self._clock.end, time.time() + least)
        return replace(fixed, began=self._began, spent=self._spent)

    def _fix_steps(self, session: Session) -> TimePlan:
        """Try a few steps, and write how many fit; ConfigError if no step fits."""
        self._hooks.on_message("minutes: trying a few steps, which are thrown away")
        if session.await_kernels is not None:
            session.await_kernels(self._run.stop_request.exists)
        blas_threads = self._choose_threads(session)
        trial, forecast = self._measure(session)
        minutes = self._minutes
        done = int(latest_state(self._run.checkpoints).get("step", 0))
        beyond = min(SHARE_BEYOND * 60 * minutes, MAX_SECONDS_BEYOND)
        now = time.time()
        steps = done + forecast.count_steps(self._end_at(60 * minutes + beyond) - now)
        least = max(done + 1, self.config.nested.frequencies[-1])
        if steps < least:  # as few as can be, if they end in time
            steps = least
            needed = forecast.seconds_of(steps - done) - VERDICT_SPARED * forecast.verdict
            missing = now + needed + SECONDS_TO_STOP - self._clock.end
            if missing > 0:
                self._refuse(forecast, minutes + missing / 60)
        self._write_iterations(steps * self.config.grad_accumulation_steps)
        passes = trial.plan.epochs * steps / trial.plan.steps
        noun = "step fits" if steps == 1 else "steps fit"
        in_threads = "" if blas_threads is None else f" with {THREADS_VARIABLE}={blas_threads}"
        text = (
            f"minutes: {steps:,} {noun} in {minutes:g} minutes{in_threads}, "
            f"{format_passes(passes)} over {trial.plan.training_file}: {forecast.step:.2g} s a "
            f"step, and the verdict about {forecast.describe_verdict()}"
        )
        if steps == least:
            text += ". That is tight: if the time ends before the verdict, --resume gives it"
        if done:
            text += f". {_describe_schedule(self.config, self._run, done, steps)}"
        if passes < 1:
            one_pass = forecast.seconds_of(round(steps / passes) - done)
            needed = math.ceil(minutes + (one_pass - forecast.seconds_of(steps - done)) / 60)
            text += f". That is little to learn from: one pass would take --minutes {needed}"
        if passes > MOST_PASSES:
            text += f". More than {MOST_PASSES} passes hardly help"
        self._hooks.on_message(text)
        return TimePlan(
            minutes=minutes,
            steps=steps,
            seconds_a_step=forecast.seconds_between(steps) / steps,
            seconds_to_begin=forecast.opening,
            seconds_to_judge=forecast.seconds_to_judge,
            began=self._began,
            spent=self._spent,
            blas_threads=blas_threads,
        )

    def _choose_threads(self, session: Session) -> int | None:
        """Choose the BLAS threads of the whole run, and use them from now on."""
        if self._earlier is not None:
            return self._earlier.blas_threads
        count = choose_blas_threads_of_run(self.config, session, self._hooks.on_message)
        self._threads.enter_context(using_blas_threads(count))
        return count

    def _measure(self, session: Session) -> tuple[TrialRun, Forecast]:
        config, run = self.config, self._run
        seconds = min(SHARE_TRIED * 60 * self._minutes, MAX_SECONDS_TRIED)
        trial = try_steps(config, run, seconds, session, self._hooks.on_message)
        with locking_devices(self._hooks.on_message, session=session):
            base = session.load_base(config)
            splits = read_dataset_record(run.dataset).splits
            forecast = make_forecast(config, splits, trial, base.model, base.tokenizer)
        mx.reset_peak_memory()  # what the run reports is its own
        return trial, forecast

    def _refuse(self, forecast: Forecast, minutes: float) -> None:
        """Raise ConfigError: the fewest steps and their verdict would take so many minutes."""
        raise ConfigError(
            f"training.minutes: {self._minutes:g} minutes hold no step and its verdict on this "
            f"machine, as busy as it is: {format_clock(time.time() - self._began)} are over, a "
            f"step takes {format_clock(forecast.step)}, an evaluation "
            f"{format_clock(forecast.evaluation)} and the verdict about "
            f"{forecast.describe_verdict()}. Give --minutes {math.ceil(minutes)} or more, or "
            f"a smaller batch_size, val_batches or training.sample_tokens."
        )

    def _write_iterations(self, iterations: int) -> None:
        """Have the configuration, and config.yaml, say so many; its time stays the run's begin."""
        training = self.config.training.model_copy(update={"epochs": None})
        self.config = self.config.model_copy(update={"iters": iterations, "training": training})
        begun = self._run.config.stat()
        write_bytes(self._run.config, render_config(self.config))
        os.utime(self._run.config, ns=(begun.st_atime_ns, begun.st_mtime_ns))

    def _end_at(self, seconds: float) -> float:
        """When these seconds of work on the run are over, in seconds since 1970."""
        return self._began + seconds - self._spent


def _find_time_spent(run: RunDirectory) -> tuple[float, float, bool]:
    """When this command began, and the seconds that earlier commands worked on its run.

    With whether it was killed and began again by itself.

    Of a command whose process was killed and begun again it is when the first one began. A command
    that was killed itself worked until its clock's last look.
    """
    plan = read_plan(run.plan)
    planned = None if plan is None else plan.time
    if planned is not None and list_earlier_ends():
        longest = 60 * (planned.minutes + MINUTES_BEYOND)
        if time.time() - planned.began <= longest:  # else it is another command's
            return planned.began, planned.spent, True
    began = STARTED if has_parent() else time.time()
    if planned is None:
        return began, 0.0, False
    last_seen = run.plan.stat().st_mtime  # the clock's, at each look
    spent = planned.spent + max(0.0, last_seen - planned.began)
    return began, spent, False


def _describe_schedule(config: FineTuneConfig, run: RunDirectory, done: int, steps: int) -> str:
    """How the learning rate of a run that is made longer goes on."""
    last = read_latest_values(run.metrics).get("learning_rate")
    rate = build_learning_rate(config, steps)
    following = to_float(rate(mx.array(done))) if callable(rate) else rate
    schedule = f"the schedule of {format_count(steps, 'step')}"
    text = f"The run goes on from step {done:,}, on {schedule}"
    if isinstance(last, float):
        text += f": the learning rate was {last:.3g}, and is {following:.3g} at the next step"
    return text


class _Clock(threading.Thread):
    """Asks a run to stop, as `nested-tune stop` does: in time for the verdict, and at the end.

    Attributes:
        end: when everything is to be over, in seconds since 1970.
        plan: of the training that goes on; None before and after it.
        has_cut: whether training was asked to stop, so that there is time for the verdict.
        stops_verdict: whether the gate is asked to stop at the end, too.
    """

    def __init__(
        self,
        run: RunDirectory,
        end: float,
        on_message: Callable[[str], None],
    ) -> None:
        super().__init__(name="minutes", daemon=True)
        self.end = end
        self.plan: TimePlan | None = None
        self.has_cut = False
        self.stops_verdict = True
        self._run = run
        self._on_message = on_message
        self._began = math.inf
        self._reports: deque[tuple[int, float]] = deque(maxlen=REPORTS_COUNTED + 1)
        self._has_asked = False
        self._is_over = threading.Event()
        self._lock = threading.Lock()  # no request is made once training is over

    def run(self) -> None:
        """Look at the clock until the run is over."""
        while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
            with suppress(FileNotFoundError):  # there is no plan yet
                os.utime(self._run.plan)
            with self._lock:
                self._note_report()
                if self.plan is not None and not self.has_cut and self._must_cut(self.plan):
                    self.has_cut = True
                    self._run.stop_request.touch()
            may_stop = self.stops_verdict or self.plan is not None
            if may_stop and self.end - time.time() <= SECONDS_TO_STOP and not self._has_asked:
                self._has_asked = True
                self._on_message("minutes: the time is over, and a minute more: stopping")
                self._run.stop_request.touch()

    @contextmanager
    def watching_training(self, plan: TimePlan) -> Iterator[None]:
        """Within the block, see that there is time for the verdict."""
        self._began = time.time()
        self._done = latest_state(self._run.checkpoints).get("step", 0)  # by earlier commands
        self.plan = plan
        try:
            yield
        finally:
            with self._lock:
                self.plan = None
                if self.has_cut:  # training may have ended before it heard of the request
                    self._run.stop_request.unlink(missing_ok=True)

    def finish(self) -> None:
        """End the thread, and a request that nobody has heard of."""
        self._is_over.set()
        if self.is_alive():
            self.join()
        if self._has_asked:
            self._run.stop_request.unlink(missing_ok=True)

    def _note_report(self) -> None:
        """Keep the step of the last report of this training, and when it was written."""
        with suppress(OSError, DamagedError):  # there is none yet
            reported = self._run.metrics.stat().st_mtime
            if reported > (self._reports[-1][1] if self._reports else self._began):
                step = read_latest_values(self._run.metrics).get("step", 0)
                if not self._reports or step > self._reports[-1][0]:
                    self._reports.append((step, reported))

    def _must_cut(self, plan: TimePlan) -> bool:
        """Whether there is just time to stop, to open the run again and to judge, with a reserve.

        Not where the steps that are left take no longer than that, nor before there is a step to
        judge or one under way. Steps, with what is due between them, count as slow as between the
        last reports, and with them all else; not the first one, in which functions are compiled.
        """
        step = plan.seconds_a_step
        left_to_train = plan.steps * step
        reports = [report for report in self._reports if report[0] > self._done]
        if reports:
            (first, began), (last, reported) = reports[0], reports[-1]
            if last > first:
                step = max(step, (reported - began) / (last - first))
            left_to_train = (plan.steps - last) * step - (time.time() - reported)
        slowdown = min(step / plan.seconds_a_step, MAX_SLOWDOWN)
        stopping = plan.seconds_a_step + plan.seconds_to_begin
        reserve = min(SHARE_RESERVED * plan.seconds_to_judge, MAX_SECONDS_RESERVED)
        needed = slowdown * (stopping + plan.seconds_to_judge + reserve)
        left = self.end - time.time() - SECONDS_TO_STOP
        is_late = left <= needed and left_to_train > slowdown * stopping
        return is_late and bool(self._reports or self._done)
