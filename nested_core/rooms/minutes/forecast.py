"""How long a run of so many steps takes with its verdict, by a few steps that were tried."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import ceil
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.data.data_settings import DataSettings
from nested_core.data.held_out_rows import read_held_out_prompts
from nested_core.gate.checks.samples import MAX_HELD_OUT_PROMPTS
from nested_core.measure.answers.suite_answers import EncodedSuite, read_suites
from nested_core.models.generation import (
    BATCH_SIZE,
    Sampling,
    answer_prompts,
    can_batch,
    encode_messages,
)
from nested_core.models.parameters import in_evaluation_mode
from nested_core.records.dataset import SplitStats, held_out_split
from nested_core.rooms.minutes.trial_run import TrialRun
from nested_core.text.duration_format import format_duration

FORWARD_SHARE = 0.5  # of a step: a loss without its gradients
TRIED_TOKENS = 8  # of an answer
TRIED_PROMPT = 4  # tokens of a prompt that is answered for the time of a token alone
SECONDS_TO_SPARE = 15.0  # of the time that lies between what is aimed at and the end
PROOF_SECONDS = 2.0  # of the fresh process that is not beside other work


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds of the parts of a run on this machine, as busy as it was when they were measured.

    opening: until the first step, without the evaluation there.
    step: of an optimizer step.
    evaluation: of the validation examples.
    checkpoint, closing: of one on the way, and of the last one with what follows it.
    verdict: of the gate.
    answers: of the verdict, that of `gate.tasks`.
    batches: of validation examples.
    """

    config: FineTuneConfig
    opening: float
    step: float
    evaluation: float
    checkpoint: float
    closing: float
    verdict: float
    answers: float
    batches: int

    def seconds_of(self, steps: int) -> float:
        """Seconds of training so many steps, with what is due between them, and the verdict."""
        between = self.seconds_between(steps)
        return self.opening + self.evaluation + between + self.closing + self.verdict

    def seconds_between(self, steps: int) -> float:
        """Seconds of so many steps, with the evaluations and checkpoints that follow them."""
        iterations = steps * self.config.grad_accumulation_steps
        due = self.config.intervals(iterations, max(1, self.batches))
        evaluations = ceil(iterations / due.evaluation)
        saves = 0 if due.save is None else iterations // due.save
        checkpoints = max(saves, evaluations)
        return steps * self.step + evaluations * self.evaluation + checkpoints * self.checkpoint

    def count_steps(self, seconds: float) -> int:
        """The most steps that fit into these seconds with their verdict; 0 if no step fits."""
        most = int((seconds - self.opening - self.verdict) / self.step)
        fitting = (steps for steps in range(most, 0, -1) if self.seconds_of(steps) <= seconds)
        return next(fitting, 0)

    def describe_verdict(self) -> str:
        """The verdict's time, with the part of it that `gate.tasks` takes."""
        text = format_duration(self.verdict)
        if self.answers:
            text += f", of which the questions of gate.tasks take {format_duration(self.answers)}"
        return text

    @property
    def seconds_to_judge(self) -> float:
        """Seconds from the end of the last step to the verdict."""
        return self.evaluation + self.closing + self.verdict


def make_forecast(
    config: FineTuneConfig,
    splits: dict[str, SplitStats],
    trial: TrialRun,
    model: Any,
    tokenizer: Any,
) -> Forecast:
    """The forecast of a configuration; its base, with any adapter, begins an answer for it.

    splits: what is in each split of the data.
    """
    step = sum(tried.seconds for tried in trial.measured) / len(trial.measured)
    forward = FORWARD_SHARE * step / config.grad_accumulation_steps  # of a batch
    valid = splits.get("valid")
    batches = 0 if valid is None else ceil(valid.rows / config.batch_size)
    if config.val_batches >= 0:
        batches = min(batches, config.val_batches)
    held_out = held_out_split(config.gate.held_out, splits)
    judged = 0 if held_out is None else ceil(splits[held_out].rows / config.batch_size)
    rows = splits["train"]
    tokens = rows.rows * config.max_seq_length if rows.tokens is None else rows.tokens.total
    prompt_token = forward * rows.rows / (config.batch_size * tokens)
    samples, answers = _seconds_of_answers(config, model, tokenizer, prompt_token)
    return Forecast(
        config=config,
        opening=trial.opening + max(0.0, trial.tried[0].seconds - step),
        step=step,
        evaluation=batches * forward,
        checkpoint=trial.checkpoint,
        closing=trial.closing,
        verdict=2 * judged * forward + samples + answers + PROOF_SECONDS,
        answers=answers,
        batches=batches,
    )


def _seconds_of_answers(
    config: FineTuneConfig, model: Any, tokenizer: Any, prompt_token: float
) -> tuple[float, float]:
    """Seconds in which base and adapter answer sample prompts, and the questions of `gate.tasks`.

    Args:
        config, model, tokenizer: the model answers a few prompts for it.
        prompt_token: seconds of a token of a prompt.
    """
    settings = DataSettings.from_config(config)
    turns: list[Any] = [[{"role": "user", "content": text}] for text in config.samples]
    held_out = read_held_out_prompts(settings, MAX_HELD_OUT_PROMPTS, config.gate.held_out)
    turns += [prompt.messages for prompt in held_out]
    read = sum(len(encode_messages(tokenizer, messages)) for messages in turns)
    suites = [EncodedSuite.encode(suite, tokenizer, None) for suite in read_suites(config.gate)]
    generated = [(len(s.prompts), s.suite.sampling) for s in suites if not any(s.choices)]
    together = max([len(turns), *(min(count, BATCH_SIZE) for count, _ in generated)])
    token = _time_token(model, tokenizer, together) if together else 0.0
    samples = 2 * read * prompt_token
    if turns:
        most = config.training.sample_tokens
        texts = [prompt.expected for prompt in held_out]
        expected = [len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts]
        # A trained adapter answers about as long as it is expected to
        of_adapter = most if config.samples or not expected else min(most, max(expected))
        samples += (most + of_adapter) * token
        # The base is asked more prompts where its answers are broken, which is seldom
        samples += max(0.0, most * token - SECONDS_TO_SPARE)
    asked_for = [
        len(prompt) * max(1, len(choices))
        for suite in suites
        for prompt, choices in zip(suite.prompts, suite.choices, strict=True)
    ]
    longest = sum(ceil(count / BATCH_SIZE) * asked.max_tokens for count, asked in generated)
    return samples, 2 * (sum(asked_for) * prompt_token + longest * token)


def _time_token(model: Any, tokenizer: Any, together: int) -> float:
    """Seconds of a token of so many answers at once."""
    prompt = encode_messages(tokenizer, [{"role": "user", "content": "?"}])[:TRIED_PROMPT]
    with in_evaluation_mode(model):
        can_batch(model)  # tries a batch, which compiles what is no part of the measure
        began = time.monotonic()
        answers = answer_prompts(model, tokenizer, [prompt] * together, Sampling(TRIED_TOKENS))
    return (time.monotonic() - began) / max(1, *(answer.tokens for answer in answers))
