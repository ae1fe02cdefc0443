"""How long a run of so many steps takes with its verdict, by a few steps that were tried."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from statistics import median
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.data.data_settings import DataSettings
from nested_core.data.held_out_rows import read_held_out_prompts
from nested_core.measure.answers.answer_bounds import MIN_PROMPTS
from nested_core.measure.answers.suite_answers import read_suites
from nested_core.models.generation import BATCH_SIZE, Sampling, encode_messages, stream_answer
from nested_core.models.parameters import in_evaluation_mode
from nested_core.records.dataset import SplitStats, held_out_split
from nested_core.rooms.minutes.trial_run import TrialRun

FORWARD_SHARE = 0.5  # of a step: a loss without its gradients
TRIED_TOKENS = 8  # of an answer
SLOW_SECONDS = 2.0  # of them: they are not asked for once more
# The gate asks the base more prompts where its own answers are broken, which is not known before:
# between the least, MIN_PROMPTS of base and adapter, and the most lies this.
ASKED_PROMPTS = 12
ROUNDS_OF_BASE = 1.5
PROOF_SECONDS = 2.0  # of the fresh process that is not beside other work


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds of the parts of a run on this machine, as busy as it was when they were measured.

    opening: until the first step, without the evaluation there.
    step: of an optimizer step.
    evaluation: of the validation examples.
    checkpoint: of one, and of what follows the last one.
    verdict: of the gate.
    """

    config: FineTuneConfig
    opening: float
    step: float
    evaluation: float
    checkpoint: float
    verdict: float

    def seconds_of(self, steps: int) -> float:
        """Seconds of training so many steps, with what is due between them, and the verdict."""
        iterations = steps * self.config.grad_accumulation_steps
        due = self.config.intervals(iterations)
        evaluations = ceil(iterations / due.evaluation)
        saves = 0 if due.save is None else iterations // due.save
        return (
            self.opening
            + steps * self.step
            + (1 + evaluations) * self.evaluation
            + max(saves, evaluations) * self.checkpoint
            + self.verdict
        )

    def count_steps(self, seconds: float) -> int:
        """The most steps that fit into these seconds with their verdict; 0 if no step fits."""
        most = int((seconds - self.opening - self.verdict) / self.step)
        fitting = (steps for steps in range(most, 0, -1) if self.seconds_of(steps) <= seconds)
        return next(fitting, 0)

    @property
    def seconds_to_judge(self) -> float:
        """Seconds from the end of the last step to the verdict."""
        return self.evaluation + self.checkpoint + self.verdict


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
    answers = _seconds_of_answers(config, model, tokenizer)
    return Forecast(
        config=config,
        opening=trial.opening + max(0.0, trial.tried[0].seconds - step),
        step=step,
        evaluation=batches * forward,
        checkpoint=trial.closing,
        verdict=2 * judged * forward + answers + PROOF_SECONDS,
    )


def _seconds_of_answers(config: FineTuneConfig, model: Any, tokenizer: Any) -> float:
    """Seconds in which the gate has sample prompts and suites answered, by one that is begun."""
    settings = DataSettings.from_config(config)
    held_out = read_held_out_prompts(settings, MIN_PROMPTS, config.gate.held_out)
    asked = [[{"role": "user", "content": text}] for text in config.samples]
    asked += [list(example.messages) for example in held_out]
    if not asked:
        return 0.0
    prompt, token = _time_answer(model, tokenizer, encode_messages(tokenizer, asked[0]))
    expected = [len(tokenizer.encode(example.expected)) for example in held_out]
    longest = config.training.sample_tokens
    of_adapter = min(longest, max(expected, default=longest))
    total = ASKED_PROMPTS * prompt + token * (ROUNDS_OF_BASE * longest + of_adapter)
    for suite in read_suites(config.gate):
        count = len(suite.questions)
        answer = ceil(count / BATCH_SIZE) * token * suite.sampling.max_tokens
        total += 2 * (count * prompt + answer)
    return total


def _time_answer(model: Any, tokenizer: Any, prompt: Sequence[int]) -> tuple[float, float]:
    """Seconds until the first token of an answer, and from a token to the next.

    Once more where that was quick: what is compiled at the first answer is no measure then.
    """
    first = following = 0.0
    for _ in range(2):
        began = time.monotonic()
        times = [began]
        with in_evaluation_mode(model):
            for _ in stream_answer(model, tokenizer, prompt, Sampling(TRIED_TOKENS)):
                times.append(time.monotonic())
        first = times[1] - began
        pauses = [later - earlier for earlier, later in pairwise(times[1:-1])]
        following = median(pauses) if pauses else first
        if times[-1] - began > SLOW_SECONDS:
            break
    return first, following
