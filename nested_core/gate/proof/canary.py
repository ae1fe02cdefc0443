"""The canary of a version: answers that a server compares its own with before it serves it.

The questions are those of suites marked `canary: true`; the fresh process of the proof answers them
one at a time, greedily, with base and adapter in the types that they are stored in.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version

from nested_core import backend
from nested_core.config.schema import FineTuneConfig
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.gate.proof.fresh_process_check import ProofRequest, StoredTypesAnswers
from nested_core.measure.answers.suite_answers import encode_suites, read_suites
from nested_core.models.base_model import find_model_folder
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.canary_file import (
    MAX_CANARY_QUESTIONS,
    Canary,
    CanaryLogits,
    CanaryQuestion,
)


@dataclass(frozen=True)
class CanaryPrompt:
    """A question of a suite in token ids, and its line in the suite's file."""

    suite: str
    line: int
    tokens: tuple[int, ...]


def choose_canary_prompts(config: FineTuneConfig) -> list[CanaryPrompt]:
    """The first questions of each suite marked as canary, as many of each as the bound allows.

    Raises what reading and encoding suites raises.
    """
    gate = config.gate
    tasks = tuple(task for task in gate.tasks if task.canary)
    if not tasks:
        return []
    tokenizer = TokenizerSource.from_config(config).load()
    suites = read_suites(gate.model_copy(update={"tasks": tasks}))
    encoded = encode_suites(suites, tokenizer, find_model_folder(config.model))
    prompts = [
        (place, CanaryPrompt(each.suite.name, question.line, tokens))
        for each in encoded
        for place, (question, tokens) in enumerate(
            zip(each.suite.questions, each.prompts, strict=True)
        )
    ]
    prompts.sort(key=lambda placed: placed[0])  # a question of each suite, then the next of each
    return [prompt for _, prompt in prompts[:MAX_CANARY_QUESTIONS]]


def make_canary(
    prompts: Sequence[CanaryPrompt], request: ProofRequest, answers: StoredTypesAnswers
) -> Canary:
    """What canary.jsonl holds, of what the fresh process answered to `prompts`."""
    rows = tuple(tuple(finite_or_none(row.tolist())) for row in answers.logits)
    logits = CanaryLogits(
        prompts=tuple(tuple(prompt) for prompt in request.prompts),
        columns=tuple(request.columns),
        values=rows,
        computation=describe_computation(),
    )
    questions = tuple(
        CanaryQuestion(prompt.suite, prompt.line, prompt.tokens, answer.tokens, answer.text)
        for prompt, answer in zip(prompts, answers.answers, strict=True)
    )
    return Canary(logits, questions)


def describe_computation() -> dict[str, str]:
    """What logits depend on beside model and prompt: machine, BLAS, and the versions of MLX."""
    prepared = backend.get_process_preparation()
    return {
        "host": platform.node(),  # a CPU's name does not say which instructions it has
        "device": backend.device_name(),
        "blas": (prepared.blas if prepared is not None else None) or "MLX's",
        "mlx": installed_version("mlx"),
        "mlx-lm": installed_version("mlx-lm"),
    }
