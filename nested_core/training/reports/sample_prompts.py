"""The configured `samples`: prompts that the model answers at each evaluation in training."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core.config.schema import FineTuneConfig
from nested_core.models.chat_template import Tokenizer
from nested_core.models.generation import Sampling, answer_prompts, encode_prompt
from nested_core.models.parameters import (
    ParameterRefs,
    assign_parameters,
    in_evaluation_mode,
    restoring_parameters,
)
from nested_core.records.dataset import PromptFormat
from nested_core.storage.run_directory import RunDirectory

MAX_SHOWN_EVALUATIONS = 8
MAX_SHOWN_PROMPTS = 4


@dataclass(frozen=True)
class SamplePrompts:
    """Prompts to answer greedily, with at most `training.sample_tokens` tokens each.

    encoded: the prompts as token ids, formatted as the training rows are.
    """

    prompts: tuple[str, ...]
    encoded: tuple[list[int], ...]
    tokenizer: Tokenizer
    max_tokens: int

    @classmethod
    def from_config(
        cls, config: FineTuneConfig, run: RunDirectory, tokenizer: Tokenizer
    ) -> SamplePrompts:
        """Create it for the prompts of `samples`, with a run that was validated."""
        rows = PromptFormat.read(run.dataset)
        encoded = tuple(encode_prompt(tokenizer, prompt, rows) for prompt in config.samples)
        return cls(config.samples, encoded, tokenizer, config.training.sample_tokens)

    def answer(
        self, model: nn.Module, refs: ParameterRefs, values: Mapping[str, mx.array]
    ) -> dict[str, Any]:
        """Answer the prompts with these parameter values, and return fields for metrics.jsonl.

        `samples` has each prompt with its answer, the number of tokens, and whether it was cut off;
        `sample_seconds` is the time for all of them. Empty without prompts.
        """
        if not self.prompts:
            return {}
        started = time.perf_counter()
        with in_evaluation_mode(model), restoring_parameters(refs):
            assign_parameters(refs, values)
            sampling = Sampling(self.max_tokens)
            answers = answer_prompts(model, self.tokenizer, self.encoded, sampling)
        samples = [
            {"prompt": prompt, "answer": a.text, "tokens": a.tokens, "is_cut_off": a.is_endless}
            for prompt, a in zip(self.prompts, answers, strict=True)
        ]
        return {"samples": samples, "sample_seconds": time.perf_counter() - started}


@dataclass(frozen=True)
class SampleTable:
    """The answers to `samples` as a small table: a row for each evaluation, a column per prompt.

    evaluations, prompt_count: how many there were; the table shows only some.
    prompts: the prompts of the shown columns.
    rows: the evaluation's step, with "(selected)" for the judged one, and the answer to each of
        `prompts`. None if a prompt was not asked then: `samples` may change when a run is resumed.
    """

    evaluations: int
    prompt_count: int
    prompts: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str | None, ...]], ...]

    @classmethod
    def from_metrics(
        cls, records: Iterable[Mapping[str, object]], judged_step: int | None
    ) -> SampleTable | None:
        """Build the table of answers from records of metrics.jsonl; None without answers.

        A row is an evaluation during training, a column a prompt of `samples`. Of many only some
        are shown; the prompts of the latest evaluation come first. A prompt that was not asked at
        an evaluation has None. `judged_step` is the step of the offered adapter.
        """
        by_step = {
            step: {str(sample["prompt"]): str(sample["answer"]) for sample in samples}
            for step, samples in samples_by_step(records).items()
        }
        if not by_step:
            return None
        latest_first = reversed(by_step.values())
        prompts = tuple(dict.fromkeys(prompt for answers in latest_first for prompt in answers))
        shown = prompts[:MAX_SHOWN_PROMPTS]
        rows = tuple(
            (
                f"{step:,} (selected)" if step == judged_step else f"{step:,}",
                tuple(by_step[step].get(prompt) for prompt in shown),
            )
            for step in choose_shown_evaluations(by_step, judged_step, MAX_SHOWN_EVALUATIONS)
        )
        return cls(len(by_step), len(prompts), shown, rows)

    def describe(self) -> str:
        """Describe how much the table shows: `8 of 1001 evaluations to 4 of 50 prompts`."""
        return (
            f"{len(self.rows)} of {self.evaluations} evaluations to {len(self.prompts)} of "
            f"{self.prompt_count} prompts"
        )


def samples_by_step(records: Iterable[Mapping[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Return the answers in records of metrics.jsonl, by optimizer step, in order.

    Each has `prompt`, `answer`, `tokens` and `is_cut_off`; step 0 is before training.
    """
    return {record.get("step", 0): record["samples"] for record in records if record.get("samples")}


def choose_shown_evaluations(
    steps: Iterable[int], judged_step: int | None, limit: int
) -> list[int]:
    """Return at most `limit` of the steps (3 or more), evenly spaced.

    First, last and judged step are always among them.
    """
    ordered = sorted(set(steps))
    if len(ordered) <= limit:
        return ordered
    required = {step for step in ordered if step in (ordered[0], judged_step, ordered[-1])}
    count = max(2, limit - len(required) + 2)
    spaced = {ordered[n * (len(ordered) - 1) // (count - 1)] for n in range(count)}
    return sorted(required | spaced)
