"""A fresh process that reads an exported model alone, and what it read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nested_core import backend
from nested_core.errors import NestedTuneError, shorten
from nested_core.gate.proof.fresh_process_check import Rows
from nested_core.process.child import Child
from nested_core.records.losses import Vector
from nested_core.rooms.export.reference import Reference

READER_PROGRAM = Path(__file__).with_name("artefact_reader.py")
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
    losses: mean loss of each held-out row in nats a token; None without rows.
    """

    reader: str
    tokenizer: str
    chat_template: str | None
    ends: frozenset[int]
    token_ids: tuple[tuple[int, ...], ...]
    logits: Rows
    losses: Vector | None
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
    prepared = backend.get_process_preparation()
    preload = {} if prepared is None or prepared.blas is None else {"LD_PRELOAD": prepared.blas}
    request = _describe_request(artefact, reader, reference)
    request |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
    with Child(READER_PROGRAM, environment=os.environ | preload) as child:
        try:
            answer = child.ask(request, TIMEOUT_SECONDS)
        except (NestedTuneError, OSError, MemoryError) as error:
            raise NestedTuneError(
                f"A new process could not read {artefact} by {reader}: {shorten(error, 400)}"
            ) from error
    return _parse_answer(answer, reference)


def _describe_request(artefact: Path, reader: ReaderName, reference: Reference) -> dict[str, Any]:
    rows = reference.rows
    examples = (
        []
        if rows is None
        else [
            {"tokens": tokens, "targets": targets}
            for tokens, targets in zip(rows.tokens, rows.targets, strict=True)
        ]
    )
    suites = [
        {
            "prompts": suite.prompts,
            "choices": suite.choices,
            "max_tokens": suite.suite.sampling.max_tokens,
            "stop": suite.suite.sampling.stop,
        }
        for suite in reference.suites
    ]
    return {
        "artefact": str(artefact),
        "reader": reader,
        "texts": reference.texts,
        "prompts": reference.prompts,
        "columns": reference.columns,
        "examples": examples,
        "suites": suites,
    }


def _parse_answer(answer: dict[str, Any], reference: Reference) -> Reading:
    rows = reference.rows
    return Reading(
        reader=answer["reader"],
        tokenizer=answer["tokenizer"],
        chat_template=answer["chat_template"],
        ends=frozenset(answer["ends"]),
        token_ids=tuple(map(tuple, answer["token_ids"])),
        logits=np.array(answer["logits"], np.float64),
        losses=None if rows is None else np.array(answer["losses"], np.float64) / rows.counts,
        suites=tuple(SuiteReading(**suite) for suite in answer["suites"]),
    )
