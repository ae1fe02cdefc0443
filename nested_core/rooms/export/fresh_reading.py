"""A fresh process that reads models from their files alone, and what it read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nested_core.errors import NestedTuneError, shorten
from nested_core.measure.answers.suite_answers import choose_likeliest
from nested_core.measure.fresh_process.starting import (
    MLX_LM_PROGRAM,
    QUESTIONS_PROGRAM,
    Rows,
    describe_model,
    describe_request,
    start_reader,
)
from nested_core.models.generation import Answer, read_answer
from nested_core.process.child import Child
from nested_core.records.losses import Vector
from nested_core.rooms.export.asked import Asked
from nested_core.rooms.export.gguf.vocabulary import choose_chat_template

LLAMA_CPP_PROGRAM = Path(__file__).with_name("llama_cpp_program.py")
TIMEOUT_SECONDS = 6 * 3600
CONTINUED_TOKENS = 8


@dataclass(frozen=True)
class Reading:
    """What a fresh process read of a model, in the order of what it was asked.

    tokenizer: SHA-256 of tokenizer.json as it is in use, or of a GGUF's token texts.
    ends: the tokens at which an answer ends.
    likelihoods: log-likelihoods of each held-out row's targets, in nats.
    answers: to each suite, by its name; empty of a base.
    continued: the tokens with which it goes on after each prompt of `Asked.continued`.
    """

    reader: str
    tokenizer: str
    chat_template: str | None
    ends: frozenset[int]
    token_ids: tuple[tuple[int, ...], ...]
    logits: Rows
    likelihoods: Vector
    answers: Mapping[str, Sequence[Answer]]
    continued: tuple[tuple[int, ...], ...] = ()


def has_llama_cpp() -> bool:
    """Return whether llama.cpp can read a GGUF here: llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


def read_base_and_adapter(asked: Asked, adapter: Path) -> tuple[Reading, Reading]:
    """Read the base, asked for losses alone, and the base with an adapter, in a new process."""
    asked = replace(asked, continued=())
    with start_reader(MLX_LM_PROGRAM) as child:
        return (
            _read(child, asked.base, None, replace(asked, suites=(), texts=())),
            _read(child, asked.base, adapter, asked),
        )


def read_in_fresh_process(artefact: Path, asked: Asked, adapter: Path | None = None) -> Reading:
    """Return what an exported model answers in a new process: mlx_lm, or llama.cpp for a GGUF.

    adapter: a LoRA as a GGUF that llama.cpp applies.

    Raises NestedTuneError if the process could not read the model.
    """
    with start_reader(MLX_LM_PROGRAM if artefact.is_dir() else LLAMA_CPP_PROGRAM) as child:
        return _read(child, artefact, adapter, asked)


def _read(child: Child, base: Path, adapter: Path | None, asked: Asked) -> Reading:
    """Return a model's answers; NestedTuneError, with its path, if the process cannot read it."""
    request = describe_request(
        [describe_model("model", base, adapter, dtype=asked.dtype)],
        asked.base,
        trusts_remote_code=asked.trusts_remote_code,
        texts=asked.texts,
        prompts=asked.prompts,
        columns=asked.columns,
        program=str(QUESTIONS_PROGRAM),
        **_describe_questions(asked),
    )
    try:
        answers = child.ask(request, TIMEOUT_SECONDS)
        if "refused" in answers:
            raise NestedTuneError(answers["error"])
    except (NestedTuneError, OSError, MemoryError) as error:
        raise NestedTuneError(
            f"A new process could not read {adapter or base}: {shorten(error, 400)}"
        ) from error
    return _parse_answer(answers["model"], asked)


def _describe_questions(asked: Asked) -> dict[str, Any]:
    """Return rows and questions in the form of measure/fresh_process/questions.py.

    The rows are the held-out ones, and then each choice of the suites after its prompt, whose
    likelihoods decide an answer. Questions without choices are asked for a text.
    """
    questions: list[dict[str, Any]] = []
    pairs = () if asked.rows is None else zip(asked.rows.tokens, asked.rows.targets, strict=True)
    rows: list[dict[str, Any]] = [{"tokens": row, "places": places} for row, places in pairs]
    for suite in asked.suites:
        sampling = suite.suite.sampling
        limits = {"max_tokens": sampling.max_tokens, "stop": sampling.stop}
        for prompt, choices in zip(suite.prompts, suite.choices, strict=True):
            for choice in choices:
                places = list(range(len(prompt), len(prompt) + len(choice)))
                rows.append({"tokens": [*prompt, *choice], "places": places})
            if not choices:
                questions.append({"prompt": prompt} | limits)
    limits = {"max_tokens": CONTINUED_TOKENS, "stop": ()}
    questions += [{"prompt": prompt} | limits for prompt in asked.continued]
    return {"rows": rows, "questions": questions}


def _parse_answer(answer: dict[str, Any], asked: Asked) -> Reading:
    """Return the process's answer as a Reading; it is in the order of `_describe_questions`."""
    rows, ends = asked.rows, frozenset(answer["ends"])
    likelihoods, texts = iter(answer["likelihoods"]), iter(answer["answers"])
    of_rows = [next(likelihoods) for _ in (() if rows is None else rows.tokens)]
    answers: dict[str, list[Answer]] = {}
    for suite in asked.suites:
        suite_answers = answers.setdefault(suite.suite.name, [])
        for question, choices in zip(suite.suite.questions, suite.choices, strict=True):
            if choices:
                text = choose_likeliest(question.choices, [next(likelihoods) for _ in choices])
                suite_answers.append(Answer(text, 0, is_endless=False, is_repeated=False))
            else:
                tokens = next(texts)["tokens"]
                tokens = tokens[:-1] if tokens and tokens[-1] in ends else tokens
                suite_answers.append(read_answer(asked.tokenizer, tokens, suite.suite.sampling))
    return Reading(
        reader=answer["reader"],
        tokenizer=answer["tokenizer"],
        chat_template=choose_chat_template(answer["chat_template"]),
        ends=ends,
        token_ids=tuple(map(tuple, answer["token_ids"])),
        logits=np.array(answer["logits"], np.float64),
        likelihoods=np.array(of_rows),
        answers=answers,
        continued=tuple(tuple(each["tokens"]) for each in texts),
    )
