"""How fast a run is, and what fits in how many minutes, as `explain` says it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import ceil

from nested_core import backend
from nested_core.config.schema import FineTuneConfig
from nested_core.models.session import Session
from nested_core.pipeline.device_lock import OnWait
from nested_core.pipeline.preflight import estimate_iterations
from nested_core.rooms.minutes.blas_threads import (
    THREADS_VARIABLE,
    choose_blas_threads_of_run,
    using_blas_threads,
)
from nested_core.rooms.minutes.forecast import Forecast
from nested_core.rooms.minutes.timed_training import measure
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.duration_format import format_duration
from nested_core.text.stages import stages
from nested_core.text.value_format import format_count, format_passes

OFFERED_MINUTES = (1, 2, 5, 10, 20, 30, 60, 120, 240, 480, 1440, 2880)
TRIED_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """How fast a run is on this machine, as busy as it was when a few steps were tried.

    seconds_a_step: of training alone.
    training_seconds: of all steps.
    seconds: of the whole run with its evaluations and its verdict.
    tokens_per_second: trained-on tokens.
    device: what they were tried on.
    sizes: the run, and shorter and longer ones, with their minutes, in words.
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
    minutes, every = config.training.minutes, config.grad_accumulation_steps
    quickest = choose_blas_threads_of_run(config, session, on_wait)
    with using_blas_threads(None if minutes is None else quickest):  # else as many as there are
        forecast = measure(config, run, TRIED_SECONDS, session, on_wait)
    if minutes is not None:
        steps = max(1, _count_steps(forecast, minutes))
        config = config.model_copy(update={"iters": steps * every})
    else:
        steps = ceil(estimate_iterations(config, run) / every)
    sizes = _describe_sizes(forecast, steps)
    has_all = minutes is None and THREADS_VARIABLE not in os.environ and os.cpu_count() != 1
    if quickest == 1 and has_all:
        sizes += f" Here and now, {THREADS_VARIABLE}=1 in the environment makes it quicker."
    return config, MeasuredRun(
        seconds_a_step=forecast.step,
        training_seconds=steps * forecast.step,
        seconds=_seconds_before(forecast) + forecast.seconds_of(steps),
        tokens_per_second=forecast.trial.tokens_per_second,
        device=backend.device(),
        sizes=sizes,
    )


def _describe_sizes(forecast: Forecast, steps: int) -> str:
    """The run of so many steps, the longest offer of at most its half, and the next longer one.

    No minutes are offered to a run that cannot have them, such as one with replay.
    """
    passes = forecast.trial.plan.epochs / forecast.trial.plan.steps  # of a step

    def describe(count: int) -> str:
        return f"{format_count(count, 'step')}, {format_passes(count * passes)} over the data"

    seconds = _seconds_before(forecast) + forecast.seconds_of(steps)
    told = [f"as configured {describe(steps)}, {format_duration(seconds)}"]
    if _can_be_timed(forecast.config):
        counts = {minutes: _count_steps(forecast, minutes) for minutes in OFFERED_MINUTES}
        shorter = [m for m, count in counts.items() if count and 120 * m <= seconds][-1:]
        longer = [m for m, count in counts.items() if count > steps][:1]
        told += [f"--minutes {m}: {describe(counts[m])}" for m in (*shorter, *longer)]
    return f"{'; '.join(told)}; each with its verdict, as busy as this machine is now."


def _can_be_timed(config: FineTuneConfig) -> bool:
    training = config.training.model_copy(update={"epochs": None, "minutes": 1.0})
    return not list(config.model_copy(update={"training": training}).find_conflicts())


def _count_steps(forecast: Forecast, minutes: float) -> int:
    return forecast.count_steps(60 * minutes - _seconds_before(forecast))


def _seconds_before(forecast: Forecast) -> float:
    """Seconds of a command until its steps are counted, about: it reads the data, and tries two."""
    return 2 * forecast.opening + 2 * forecast.step + forecast.checkpoint
