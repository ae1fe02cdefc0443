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

    opening: until the first step, without the evaluation there.
    step: of an optimizer step.
    evaluation: of the validation examples; batches: how many these are.
    checkpoint: of one.
    verdict: of the gate.
    trial: the steps that were tried.
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
        """Forecast the seconds of so many steps, with what is due between them, and the verdict."""
        between = self.seconds_between(steps)
        return self.opening + self.evaluation + between + self.checkpoint + self.verdict

    def seconds_between(self, steps: int) -> float:
        """Forecast the seconds of so many steps, with evaluations and checkpoints between them."""
        iterations = steps * self.config.grad_accumulation_steps
        due = self.config.intervals(iterations, max(1, self.batches))
        evaluations = ceil(iterations / due.evaluation)
        saves = 0 if due.save is None else iterations // due.save
        checkpoints = max(saves, evaluations)
        return steps * self.step + evaluations * self.evaluation + checkpoints * self.checkpoint

    def count_steps(self, seconds: float) -> int:
        """Count the steps that fit into these seconds with their verdict; 0 if none fits."""
        most = int((seconds - self.opening - self.verdict) / self.step)
        fitting = (steps for steps in range(most, 0, -1) if self.seconds_of(steps) <= seconds)
        return next(fitting, 0)


def make_forecast(
    config: FineTuneConfig, run: RunDirectory, trial: TrialRun, model: Any, tokenizer: Any
) -> Forecast:
    """Forecast a configuration; its base, with any adapter, begins an answer for it."""
    splits = read_dataset_record(run.dataset).splits
    forward = FORWARD_SHARE * trial.step / config.grad_accumulation_steps  # of a batch
    batches = ceil(splits["valid"].rows / config.batch_size) if "valid" in splits else 0
    if config.val_batches >= 0:
        batches = min(batches, config.val_batches)
    train = splits["train"]
    tokens = train.rows * config.max_seq_length if train.tokens is None else train.tokens.total
    row = forward / config.batch_size
    return Forecast(
        config=config,
        opening=trial.opening + trial.rows_to_begin * row,
        step=trial.step,
        evaluation=batches * forward,
        batches=batches,
        checkpoint=trial.checkpoint,
        verdict=_forecast_verdict(
            RunToJudge(config, run, tokenizer), model, row, row * train.rows / tokens
        ),
        trial=trial,
    )


def _forecast_verdict(run: RunToJudge, model: Any, row: float, prompt_token: float) -> float:
    """Forecast the gate's seconds, by what each of its checks computes.

    Args:
        run, model: the model begins an answer for it.
        row: seconds of a row of data, without gradients.
        prompt_token: seconds of a token of a prompt that is read.
    """
    bounds = run.config.gate_bounds
    checks = [one for one in list_checks_with_model() if one.is_asked(bounds)]
    works = [check.plan_work(run) for check in checks if check.plan_work is not None]
    tokens, together = sum(one.tokens for one in works), max(one.answers for one in works)
    token = _time_token(model, run.tokenizer, together) if tokens else 0.0
    read = sum(one.prompt_tokens for one in works)
    rows = sum(one.rows for one in works)
    return rows * row + read * prompt_token + tokens * token + PROOF_SECONDS


def _time_token(model: Any, tokenizer: Any, together: int) -> float:
    """Time a token of so many answers at once, in seconds."""
    prompt = encode_messages(tokenizer, [{"role": "user", "content": "?"}])
    with in_evaluation_mode(model):
        can_batch(model)  # tries a batch, which compiles what is no part of the measure
        began = time.monotonic()
        prompts = [prompt[:TRIED_PROMPT]] * together
        answers = answer_prompts(model, tokenizer, prompts, Sampling(TRIED_TOKENS))
    return (time.monotonic() - began) / max(1, *(answer.tokens for answer in answers))
