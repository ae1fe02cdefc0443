"""How long a run of so many steps takes with its verdict, by a few steps that were tried."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import ceil
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.gate.checks.planned_work import RunToJudge
from nested_core.gate.judge import list_checks_with_model
from nested_core.models.generation import Sampling, answer_prompts, can_batch, encode_messages
from nested_core.models.parameters import in_evaluation_mode
from nested_core.records.dataset import read_dataset_record
from nested_core.rooms.minutes.trial_run import TrialRun
from nested_core.storage.run_directory import RunDirectory

FORWARD_SHARE = 0.5  # of a step: a loss without its gradients
TRIED_TOKENS = 8  # of an answer
TRIED_PROMPT = 4  # tokens of a prompt that is answered for the time of a token alone
PROOF_SECONDS = 2.0  # of the fresh process that is not beside other work


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds of the parts of a run on this machine, as busy as it was when they were measured.

    opening: seconds until the first step, without the evaluation there.
    step: seconds of an optimizer step.
    evaluation: seconds of an evaluation of the validation examples.
    batches: the number of batches in an evaluation.
    checkpoint: seconds of a checkpoint.
    verdict: seconds of the gate.
    trial: the measurement of a few steps that this rests on.
    """

    config: FineTuneConfig
    opening: float
    step: float
    evaluation: float
    batches: int
    checkpoint: float
    verdict: float
    trial: TrialRun

    def seconds_of(self, steps: int) -> float:
        """Return the seconds of a whole run of so many steps: from its opening to its verdict."""
        between = self.seconds_between(steps)
        return self.opening + self.evaluation + between + self.checkpoint + self.verdict

    def seconds_between(self, steps: int) -> float:
        """Return the seconds of so many steps, with evaluations and checkpoints between them."""
        iterations = steps * self.config.grad_accumulation_steps
        due = self.config.intervals(iterations, max(1, self.batches))
        evaluations = ceil(iterations / due.evaluation)
        checkpoints = max(0 if due.save is None else iterations // due.save, evaluations)
        return steps * self.step + evaluations * self.evaluation + checkpoints * self.checkpoint

    def count_steps(self, seconds: float) -> int:
        """Return the most steps whose whole run takes at most these seconds; 0 if none fits."""
        limit = int((seconds - self.opening - self.verdict) / self.step)
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
        opening=trial.opening + trial.rows_to_begin * row,
        step=trial.step,
        evaluation=batches * batch,
        batches=batches,
        checkpoint=trial.checkpoint,
        verdict=_forecast_verdict(judged, model, row, row * train.rows / tokens),
        trial=trial,
    )


def _forecast_verdict(run: RunToJudge, model: Any, row: float, prompt_token: float) -> float:
    """Forecast the gate's seconds: the work that its checks plan, times what each part takes.

    Args:
        run: the run that is to be judged.
        model: the base; the seconds of a generated token are measured with it.
        row: seconds of a row of data, without gradients.
        prompt_token: seconds of a token of a prompt.
    """
    bounds = run.config.gate_bounds
    checks = [one for one in list_checks_with_model() if one.is_asked(bounds)]
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
