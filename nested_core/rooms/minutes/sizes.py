"""What fits in how many minutes, as `explain` says it: a short trial, half of a run, all of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import ceil
from statistics import median

from nested_core import backend
from nested_core.config.schema import FineTuneConfig
from nested_core.models.session import Session
from nested_core.pipeline.device_lock import OnWait, locking_devices
from nested_core.pipeline.preflight import estimate_iterations
from nested_core.records.dataset import read_dataset_record
from nested_core.rooms.minutes.blas_threads import (
    THREADS_VARIABLE,
    choose_blas_threads_of_run,
    using_blas_threads,
)
from nested_core.rooms.minutes.forecast import Forecast, make_forecast
from nested_core.rooms.minutes.trial_run import try_steps
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.duration_format import format_duration
from nested_core.text.stages import stages
from nested_core.text.value_format import format_count, format_passes

ROUND_MINUTES = (1, 2, 3, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 360, 480, 720, 1440, 2880)
TRIED_SECONDS = 2.0
SHORT_SHARE, HALF_SHARE = 1 / 6, 1 / 2  # of the whole run's time, at most


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """How fast a run is on this machine, as busy as it was when a few steps were tried.

    seconds_a_step: of training alone.
    training_seconds: of all steps.
    seconds: of the whole run with its evaluations and its verdict.
    tokens_per_second: trained-on tokens, the median of the tried steps.
    device: what they were tried on.
    sizes: three sizes of the run with their minutes, in words.
    """

    seconds_a_step: float
    training_seconds: float
    seconds: float
    tokens_per_second: float
    device: str
    sizes: str

    def describe(self) -> dict[str, str]:
        """Sentences for each subject."""
        duration = format_duration(max(self.training_seconds, 1.0))
        time = (
            f"about {duration} of training, by a few steps that were tried on this machine "
            f"({self.device}): {self.tokens_per_second:,.0f} trained-on tokens a second. "
            f"Evaluations and the gate come on top."
        )
        return {"time": time, "sizes": self.sizes}


def measure_run(
    config: FineTuneConfig, run: RunDirectory, session: Session, on_wait: OnWait | None
) -> tuple[FineTuneConfig, MeasuredRun]:
    """Try a few steps of a run that is validated and loaded.

    With how fast it is, the configuration, with the iterations that its minutes come to.
    """
    stages.info("explain: trying a few steps")
    quickest = choose_blas_threads_of_run(config, session, on_wait)
    has_quickest = config.training.minutes is not None  # any other run has as many as there are
    with using_blas_threads(quickest if has_quickest else None):
        trial = try_steps(config, run, TRIED_SECONDS, session, on_wait)
        splits = read_dataset_record(run.dataset).splits
        with locking_devices(on_wait, session=session):
            base = session.load_base(config)
            forecast = make_forecast(config, splits, trial, base.model, base.tokenizer)
    every = config.grad_accumulation_steps
    passes = trial.plan.epochs / trial.plan.steps  # of a step
    if config.training.minutes is not None:
        steps = max(1, _count_steps(forecast, config.training.minutes))
        config = config.model_copy(update={"iters": steps * every})
    else:
        steps = ceil(estimate_iterations(config, run) / every)
    sizes = _describe_sizes(forecast, steps, passes)
    if quickest == 1 and not (
        has_quickest or THREADS_VARIABLE in os.environ or os.cpu_count() == 1
    ):
        sizes += f" Here and now, {THREADS_VARIABLE}=1 in the environment makes it quicker."
    measured = MeasuredRun(
        seconds_a_step=forecast.step,
        training_seconds=steps * forecast.step,
        seconds=_seconds_before(forecast) + forecast.seconds_of(steps),
        tokens_per_second=median(step.tokens / step.seconds for step in trial.measured),
        device=backend.device(),
        sizes=sizes,
    )
    return config, measured


def _describe_sizes(forecast: Forecast, steps: int, passes: float) -> str:
    """The whole run of so many steps, and two others; `passes` over the data is a step."""
    seconds = _seconds_before(forecast) + forecast.seconds_of(steps)
    whole = f"as configured {_describe(steps, passes)}, {format_duration(seconds)}"
    chosen = {m: _count_steps(forecast, m) for m in _choose(forecast, seconds, steps)}
    parts = [(60.0 * m, f"--minutes {m}: {_describe(n, passes)}") for m, n in chosen.items()]
    told = [text for _, text in sorted([*parts, (seconds, whole)])]
    return f"{'; '.join(told)}; each with its verdict, as busy as this machine is now."


def _choose(forecast: Forecast, seconds: float, steps: int) -> list[int]:
    """Minutes of two sizes beside a whole run of so many seconds: shorter, or with more steps."""
    possible = [minutes for minutes in ROUND_MINUTES if _count_steps(forecast, minutes)]
    shorter = [minutes for minutes in possible if 60 * minutes <= HALF_SHARE * seconds]
    short = [minutes for minutes in shorter if 60 * minutes <= SHORT_SHARE * seconds]
    longer = [minutes for minutes in possible if _count_steps(forecast, minutes) > steps]
    chosen = dict.fromkeys([*short[-1:], *shorter[-1:], *shorter[:1], *longer])
    return list(chosen)[:2]


def _count_steps(forecast: Forecast, minutes: float) -> int:
    return forecast.count_steps(60 * minutes - _seconds_before(forecast))


def _seconds_before(forecast: Forecast) -> float:
    """Seconds of a command until its steps are fixed, about: it reads the data, and tries two."""
    return 2 * forecast.opening + 2 * forecast.step + forecast.closing


def _describe(steps: int, passes: float) -> str:
    passed = format_passes(steps * passes)
    return f"{format_count(steps, 'step')}, {passed} over the training data"
