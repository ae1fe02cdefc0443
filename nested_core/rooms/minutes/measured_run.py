"""How fast a run is on this machine, as `explain`, `sweep` and `continual.policy: auto` ask it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import ceil

from nested_core import backend
from nested_core.config.schema import FineTuneConfig
from nested_core.models.session import Session
from nested_core.pipeline.device_lock import OnWait
from nested_core.pipeline.preflight import estimate_iterations
from nested_core.rooms.minutes.blas_threads import choose_blas_threads_of_run, using_blas_threads
from nested_core.rooms.minutes.timed_training import measure
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.duration_format import format_duration
from nested_core.text.stages import stages
from nested_core.text.value_format import format_speed

TRIED_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """How fast a run is, as busy as the machine was when a few steps were tried.

    seconds_a_step: seconds of a step of training.
    training_seconds: seconds of all steps.
    seconds: seconds of the whole run, with its evaluations and its verdict.
    tokens_per_second: trained-on tokens.
    """

    seconds_a_step: float
    training_seconds: float
    seconds: float
    tokens_per_second: float

    def describe(self) -> dict[str, str]:
        """Return a sentence for the subject `time` of the page of `explain`."""
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        busy = f" (load {load:.0f} on {cores} cores): shorter when it is quiet, or by --minutes"
        time = (
            f"about {format_duration(max(self.training_seconds, 1.0))} of training, by a few steps "
            f"that were tried on this machine ({backend.device()}): "
            f"{format_speed(self.tokens_per_second)} trained-on tokens a second. With evaluations "
            f"and the gate about {format_duration(self.seconds)}, as busy as the machine is now"
            f"{busy if load > cores else ''}."
        )
        return {"time": time}


def measure_run(
    config: FineTuneConfig, run: RunDirectory, session: Session, on_wait: OnWait | None
) -> tuple[FineTuneConfig, MeasuredRun]:
    """Try a few steps of a run that is validated and loaded, and return how fast it is.

    The first value is the configuration; with `training.minutes` it has the number of iterations
    that fit into them.
    """
    stages.info("explain: trying a few steps")
    minutes, accumulation = config.training.minutes, config.grad_accumulation_steps
    threads = None if minutes is None else choose_blas_threads_of_run(config, session, on_wait)
    with using_blas_threads(threads):
        forecast = measure(config, run, TRIED_SECONDS, session, on_wait)
    # About what a command takes before its first step: it loads twice and tries two steps
    before = 2 * forecast.opening + 2 * forecast.step + forecast.checkpoint
    steps = ceil(estimate_iterations(config, run) / accumulation)
    if minutes is not None:
        steps = max(1, forecast.count_steps(60 * minutes - before))
        config = config.model_copy(update={"iters": steps * accumulation})
    return config, MeasuredRun(
        seconds_a_step=forecast.step,
        training_seconds=steps * forecast.step,
        seconds=before + forecast.seconds_of(steps),
        tokens_per_second=forecast.trial.tokens_per_second,
    )
