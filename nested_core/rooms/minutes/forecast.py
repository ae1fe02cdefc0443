"""How long a run of so many steps takes with its verdict, by a few steps that are tried before.

They are trained in a temporary folder and thrown away.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import mlx.core as mx

from nested_core import backend
from nested_core.config.loading import render_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import TrainingStopped
from nested_core.gate.checks.judged import RunToJudge
from nested_core.gate.judge import list_checks_with_model
from nested_core.models.generation import Sampling, answer_prompts, can_batch, encode_messages
from nested_core.models.parameters import in_evaluation_mode
from nested_core.models.session import Session
from nested_core.pipeline import steps
from nested_core.pipeline.device_lock import OnWait, locking_devices
from nested_core.pipeline.preflight import estimate_iterations
from nested_core.pipeline.processes import count_processes
from nested_core.records.dataset import read_dataset_record
from nested_core.rooms.minutes.blas_threads import choose_blas_threads_of_run, using_blas_threads
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.duration_format import format_duration
from nested_core.text.stages import receiving_stages, stages
from nested_core.text.value_format import format_speed
from nested_core.training.trainer import Trainer

MOST_STEPS = 5_000
SLOW_FIRST_STEP = 30.0  # seconds
MOST_STEPS_IN_RANKS = 12  # which do not tell how long they take; or until the slowest tier is due
TRIED_SECONDS = 2.0
FORWARD_SHARE = 0.5  # of a step: a loss without its gradients
TRIED_TOKENS = 8  # of an answer
TRIED_PROMPT = 4  # tokens of a prompt that is answered for the time of a token alone
PROOF_SECONDS = 2.0  # of the fresh process that is not beside other work


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
    measured = clock.seconds[1:] or clock.seconds  # the first step compiles functions
    step = sum(measured) / len(measured)
    return TrialRun(
        opening=max(0.0, clock.last_report - clock.began - sum(measured)),
        step=step,
        tokens_per_second=clock.tokens / sum(clock.seconds),
        checkpoint=ended - clock.last_report,
        rows_to_begin=clock.rows_to_begin,
        passes_of_a_step=clock.passes_of_a_step,
    )


class _Clock:
    """mlx-lm's callback protocol: times each step, and ends training when it has taken long."""

    def __init__(self, iterations_a_step: int, seconds: float) -> None:
        self.began = self.last_report = time.monotonic()
        self.seconds: list[float] = []  # of each step
        self.tokens = 0
        self.rows_to_begin, self.passes_of_a_step = 0, 0.0  # not known of several processes
        self._most_seconds = seconds
        self._iterations = iterations_a_step
        self._first_step = self.began

    def watch(self, trainer: Any) -> None:
        """Have the trainer call `_after_step` after each step, and note when its first one begins.

        With several processes, for which a group stands, that call does not come.
        """
        if isinstance(trainer, Trainer):
            self.rows_to_begin = trainer.setup.loss_fn.rows_to_begin
            self.passes_of_a_step = trainer.step_schedule.epochs / trainer.step_schedule.steps
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


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds of the parts of a run on this machine, as busy as it was when they were measured.

    trial: the measurement of a few steps that this rests on: seconds of a step and a checkpoint.
    opening: seconds until the first step, without the evaluation there.
    evaluation: seconds of an evaluation of the validation examples.
    batches: the number of batches in an evaluation.
    verdict: seconds of the gate.
    """

    config: FineTuneConfig
    trial: TrialRun
    opening: float
    evaluation: float
    batches: int
    verdict: float

    def seconds_of(self, steps: int) -> float:
        """Return the seconds of a whole run of so many steps: from its opening to its verdict."""
        training = self.evaluation + self.seconds_between(steps) + self.trial.checkpoint
        return self.opening + training + self.verdict

    def seconds_between(self, steps: int) -> float:
        """Return the seconds of so many steps, with evaluations and checkpoints between them."""
        iterations = steps * self.config.grad_accumulation_steps
        due = self.config.intervals(iterations, max(1, self.batches))
        evaluations = ceil(iterations / due.evaluation)
        checkpoints = max(0 if due.save is None else iterations // due.save, evaluations)
        stepping, keeping = steps * self.trial.step, checkpoints * self.trial.checkpoint
        return stepping + evaluations * self.evaluation + keeping

    def count_steps(self, seconds: float) -> int:
        """Return the most steps whose whole run takes at most these seconds; 0 if none fits."""
        limit = int((seconds - self.opening - self.verdict) / self.trial.step)
        return next((n for n in range(limit, 0, -1) if self.seconds_of(n) <= seconds), 0)


def make_forecast(
    config: FineTuneConfig, run: RunDirectory, trial: TrialRun, model: Any, tokenizer: Any
) -> Forecast:
    """Forecast the seconds of a run by those of a few steps and of a short answer of the model.

    Args:
        config: the configuration.
        run: its run directory, validated.
        trial: the measurement of a few steps.
        model, tokenizer: the base with any adapter, which generates the answer.
    """
    splits = read_dataset_record(run.dataset).splits
    batch = FORWARD_SHARE * trial.step / config.grad_accumulation_steps  # seconds
    batches = ceil(splits["valid"].rows / config.batch_size) if "valid" in splits else 0
    if config.val_batches >= 0:
        batches = min(batches, config.val_batches)
    train = splits["train"]
    tokens = train.rows * config.max_seq_length if train.tokens is None else train.tokens.total
    row = batch / config.batch_size  # seconds, without gradients
    judged = RunToJudge(config, run, tokenizer)
    return Forecast(
        config=config,
        trial=trial,
        opening=trial.opening + trial.rows_to_begin * row,
        evaluation=batches * batch,
        batches=batches,
        verdict=_forecast_verdict(judged, model, row, row * train.rows / tokens),
    )


def _forecast_verdict(run: RunToJudge, model: Any, row: float, prompt_token: float) -> float:
    """Forecast the gate's seconds: the work that its checks plan, times what each part takes.

    Args:
        run: the run that is to be judged.
        model: the base; the seconds of a generated token are measured with it.
        row: seconds of a row of data, without gradients.
        prompt_token: seconds of a token of a prompt.
    """
    checks = [one for one in list_checks_with_model() if one.is_asked(run.config.gate_bounds)]
    works = [check.plan_work(run) for check in checks if check.plan_work is not None]
    tokens, batch_size = sum(one.tokens for one in works), max(one.answers for one in works)
    generating = tokens * _time_token(model, run.tokenizer, batch_size) if tokens else 0.0
    reading = prompt_token * sum(one.prompt_tokens for one in works)
    return row * sum(one.rows for one in works) + reading + generating + PROOF_SECONDS


def _time_token(model: Any, tokenizer: Any, batch_size: int) -> float:
    """Measure the seconds in which the model generates a token of each answer of a batch."""
    prompt = encode_messages(tokenizer, [{"role": "user", "content": "?"}])
    with in_evaluation_mode(model):
        can_batch(model)  # generates a batch, and so compiles functions before the clock starts
        began = time.monotonic()
        prompts = [prompt[:TRIED_PROMPT]] * batch_size
        answers = answer_prompts(model, tokenizer, prompts, Sampling(TRIED_TOKENS))
    return (time.monotonic() - began) / max(1, *(answer.tokens for answer in answers))


def measure(
    config: FineTuneConfig,
    run: RunDirectory,
    seconds: float,
    session: Session,
    on_wait: OnWait | None,
) -> Forecast:
    """Try steps of a run that is validated and loaded; return the forecast of the whole run.

    seconds: how long steps are tried.
    """
    trial = try_steps(config, run, seconds, session, on_wait)
    with locking_devices(on_wait, session=session):
        base = session.load_base(config)
        forecast = make_forecast(config, run, trial, base.model, base.tokenizer)
    mx.reset_peak_memory()  # so that the run reports its own peak
    return forecast


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
    trial = forecast.trial
    before = 2 * forecast.opening + 2 * trial.step + trial.checkpoint
    steps = ceil(estimate_iterations(config, run) / accumulation)
    if minutes is not None:
        steps = max(1, forecast.count_steps(60 * minutes - before))
        config = config.model_copy(update={"iters": steps * accumulation})
    return config, MeasuredRun(
        seconds_a_step=trial.step,
        training_seconds=steps * trial.step,
        seconds=before + forecast.seconds_of(steps),
        tokens_per_second=trial.tokens_per_second,
    )
