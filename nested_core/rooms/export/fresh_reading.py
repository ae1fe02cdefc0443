"""A fresh process that reads an exported model alone, and what it read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nested_core.errors import NestedTuneError, shorten
from nested_core.measure.fresh_process.starting import (
    MLX_LM_PROGRAM,
    QUESTIONS_PROGRAM,
    Rows,
    describe_model,
    describe_request,
    start_reader,
)
from nested_core.records.losses import Vector
from nested_core.rooms.export.reference import Reference

LLAMA_CPP_PROGRAM = Path(__file__).with_name("llama_cpp_program.py")
TIMEOUT_SECONDS = 6 * 3600
ReaderName = Literal["mlx_lm", "llama.cpp"]


@dataclass(frozen=True)
class SuiteReading:
    """Answers to a suite: token ids of each, or for choices the log-likelihoods of each."""

    answers: Sequence[Sequence[int]] = ()
    likelihoods: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Reading:
    """What a fresh process read of an artefact, in the order of what the reference has.

    tokenizer: SHA-256 of tokenizer.json as it is in use, or of a GGUF's token texts.
    ends: the tokens at which an answer ends.
    likelihoods: log-likelihoods of each held-out row's targets, in nats.
    """

    reader: str
    tokenizer: str
    chat_template: str | None
    ends: frozenset[int]
    token_ids: tuple[tuple[int, ...], ...]
    logits: Rows
    likelihoods: Vector
    suites: tuple[SuiteReading, ...]


def has_llama_cpp() -> bool:
    """Whether llama.cpp can read a GGUF here: llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


def read_in_fresh_process(
    artefact: Path,
    reader: ReaderName,
    reference: Reference,
    *,
    dtype: str | None,
    trust_remote_code: bool = False,
) -> Reading:
    """Read an artefact in a new process, which is asked what the reference was asked.

    dtype: what mlx_lm computes in; None is what it is stored in. Raises NestedTuneError where the
    process could not read it.
    """
    program = MLX_LM_PROGRAM if reader == "mlx_lm" else LLAMA_CPP_PROGRAM
    request = describe_request(
        [describe_model("artefact", artefact, dtype=dtype)],
        reference.folder,
        trusts_remote_code=trust_remote_code,
        **describe_questions(reference),
    )
    with start_reader(program) as child:
        try:
            answers = child.ask(request | {"program": str(QUESTIONS_PROGRAM)}, TIMEOUT_SECONDS)
        except (NestedTuneError, OSError, MemoryError) as error:
            raise _make_error(artefact, reader, error) from error
    if "refused" in answers:
        raise _make_error(artefact, reader, answers["error"])
    return _parse_answer(answers["artefact"], reference)


def _make_error(artefact: Path, reader: str, error: Exception | str) -> NestedTuneError:
    return NestedTuneError(
        f"A new process could not read {artefact} by {reader}: {shorten(error, 400)}"
    )


def describe_questions(reference: Reference) -> dict[str, Any]:
    """What is asked of a model, in the words of measure/fresh_process/questions.py.

    The rows are the held-out ones, and then the choices of each suite after their prompts.
    """
    rows: list[dict[str, Any]] = []
    questions = []
    if reference.rows is not None:
        pairs = zip(reference.rows.tokens, reference.rows.targets, strict=True)
        rows += [{"tokens": tokens, "places": places} for tokens, places in pairs]
    for suite in reference.suites:
        sampling = suite.suite.sampling
        for prompt, choices in zip(suite.prompts, suite.choices, strict=True):
            rows += [
                {
                    "tokens": [*prompt, *choice],
                    "places": list(range(len(prompt), len(prompt) + len(choice))),
                }
                for choice in choices
            ]
            if not choices:
                questions.append(
                    {"prompt": prompt, "max_tokens": sampling.max_tokens, "stop": sampling.stop}
                )
    return {
        "texts": reference.texts,
        "prompts": reference.prompts,
        "columns": reference.columns,
        "rows": rows,
        "questions": questions,
    }


def _parse_answer(answer: dict[str, Any], reference: Reference) -> Reading:
    rows, ends = reference.rows, frozenset(answer["ends"])
    likelihoods, answers = iter(answer["likelihoods"]), iter(answer["answers"])
    of_rows = [] if rows is None else [next(likelihoods) for _ in rows.tokens]
    suites = []
    for suite in reference.suites:
        if any(suite.choices):
            weighed = [[next(likelihoods) for _ in choices] for choices in suite.choices]
            suites.append(SuiteReading(likelihoods=weighed))
        else:
            tokens = [next(answers)["tokens"] for _ in suite.prompts]
            suites.append(
                SuiteReading([own[:-1] if own and own[-1] in ends else own for own in tokens])
            )
    return Reading(
        reader=answer["reader"],
        tokenizer=answer["tokenizer"],
        chat_template=answer["chat_template"],
        ends=ends,
        token_ids=tuple(map(tuple, answer["token_ids"])),
        logits=np.array(answer["logits"], np.float64),
        likelihoods=np.array(of_rows),
        suites=tuple(suites),
    )
