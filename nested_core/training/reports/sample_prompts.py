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
            answers = answer_prompts(model, self.tokenizer, self.encoded, Sampling(self.max_tokens))
        samples = [
            {"prompt": prompt, "answer": a.text, "tokens": a.tokens, "is_cut_off": a.is_endless}
            for prompt, a in zip(self.prompts, answers, strict=True)
        ]
        return {"samples": samples, "sample_seconds": time.perf_counter() - started}


def samples_by_step(records: Iterable[Mapping[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Return the answers in records of metrics.jsonl, by optimizer step, in order.

    Each has `prompt`, `answer`, `tokens` and `is_cut_off`; step 0 is before training.
    """
    return {record.get("step", 0): record["samples"] for record in records if record.get("samples")}
