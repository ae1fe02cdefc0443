"""The configured `samples`: prompts that the model in training answers at each evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core.config.schema import FineTuneConfig
from nested_core.models.generation import Sampling, answer_prompts, encode_prompt
from nested_core.models.parameters import (
    ParameterRefs,
    assign_parameters,
    in_evaluation_mode,
    restoring_parameters,
)


@dataclass(frozen=True)
class SamplePrompts:
    """Prompts, and how they are answered: greedy, with at most `training.sample_tokens` tokens."""

    prompts: tuple[str, ...]
    tokenizer: Any
    max_tokens: int

    @classmethod
    def from_config(cls, config: FineTuneConfig, tokenizer: Any) -> SamplePrompts:
        """The prompts of `samples`."""
        return cls(config.samples, tokenizer, config.training.sample_tokens)

    def answer(
        self, model: nn.Module, refs: ParameterRefs, values: Mapping[str, mx.array]
    ) -> dict[str, Any]:
        """What a record of metrics.jsonl holds of the answers with these parameters.

        `samples`: a prompt and its answer each, the number of tokens, and whether it was cut off;
        `sample_seconds`: what all of them took. Empty without prompts.
        """
        if not self.prompts:
            return {}
        started = time.perf_counter()
        encoded = [encode_prompt(self.tokenizer, prompt) for prompt in self.prompts]
        with in_evaluation_mode(model), restoring_parameters(refs):
            assign_parameters(refs, values)
            answers = answer_prompts(model, self.tokenizer, encoded, Sampling(self.max_tokens))
        samples = [
            {"prompt": prompt, "answer": a.text, "tokens": a.tokens, "is_cut_off": a.is_endless}
            for prompt, a in zip(self.prompts, answers, strict=True)
        ]
        return {"samples": samples, "sample_seconds": time.perf_counter() - started}


def samples_by_step(records: Iterable[Mapping[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The answers in records of metrics.jsonl, by optimizer step, in order.

    Each has `prompt`, `answer`, `tokens` and `is_cut_off`; step 0 is before training.
    """
    return {record["step"]: record["samples"] for record in records if record.get("samples")}


def choose_shown_evaluations(
    steps: Iterable[int], judged_step: int | None, limit: int
) -> list[int]:
    """At most `limit` (2 or more) of the steps: first, last, the judged one, and some between.

    Those between are evenly spaced.
    """
    ordered = sorted(set(steps))
    if len(ordered) <= limit:
        return ordered
    fixed = {step for step in ordered if step in (ordered[0], judged_step, ordered[-1])}
    count = max(2, limit - len(fixed) + 2)
    spaced = {ordered[n * (len(ordered) - 1) // (count - 1)] for n in range(count)}
    return sorted(fixed | spaced)
