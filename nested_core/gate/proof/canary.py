"""The canary of a registered version: answers that a server must reproduce before it serves it.

The questions are those of suites marked `canary: true`. The fresh process of the proof answers them
one at a time, greedily, with base and adapter in the types in which they are stored.
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
from nested_core.records.dataset import PromptFormat
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.canary_file import (
    MAX_CANARY_QUESTIONS,
    Canary,
    CanaryLogits,
    CanaryQuestion,
)


@dataclass(frozen=True)
class CanaryPrompt:
    """A question of a suite as token ids, and its line in the suite's file."""

    suite: str
    line: int
    tokens: tuple[int, ...]


def choose_canary_prompts(
    config: FineTuneConfig, prompt_format: PromptFormat | None
) -> list[CanaryPrompt]:
    """Return up to MAX_CANARY_QUESTIONS questions from the suites marked as canary, in token ids.

    Their answers are stored with the adapter, so that it can be checked later that a server
    computes the same. A suite is a file of questions.

    prompt_format: of the training rows, as which a question's `prompt` is asked.

    They are taken in turns: the first question of every suite, then the second of every suite.
    Raises ConfigError or DatasetError if a suite cannot be read or encoded.
    """
    gate = config.gate
    tasks = tuple(task for task in gate.tasks if task.canary)
    if not tasks:
        return []
    tokenizer = TokenizerSource.from_config(config).load()
    suites = read_suites(gate.model_copy(update={"tasks": tasks}))
    encoded = encode_suites(suites, tokenizer, find_model_folder(config.model), prompt_format)
    prompts = [
        (position, CanaryPrompt(suite.suite.name, question.line, tokens))
        for suite in encoded
        for position, (question, tokens) in enumerate(
            zip(suite.suite.questions, suite.prompts, strict=True)
        )
    ]
    prompts.sort(key=lambda pair: pair[0])  # stable: suites stay in order at each position
    return [prompt for _, prompt in prompts[:MAX_CANARY_QUESTIONS]]


def make_canary(
    prompts: Sequence[CanaryPrompt], request: ProofRequest, answers: StoredTypesAnswers
) -> Canary:
    """Build the content of canary.jsonl: what the adapter must answer wherever it is loaded.

    prompts: the questions that were asked. request: has the prompts whose logits were computed, and
        which `columns` of the vocabulary are kept.
    answers: what the fresh process computed, with the adapter in its stored dtypes.
    """
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
    """Return what logits depend on besides model and prompt: machine, BLAS, versions of MLX."""
    return {
        "host": platform.node(),  # a CPU's name does not say which instructions it has
        "device": backend.device_name(),
        "blas": backend.find_openblas() or "MLX's",
        "mlx": installed_version("mlx"),
        "mlx-lm": installed_version("mlx-lm"),
    }
