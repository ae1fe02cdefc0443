"""answers.jsonl and sample-answers.jsonl: their types, readers and writers.

answers.jsonl has one line for each answer of each model to each question of `gate.tasks`.
sample-answers.jsonl has what base and adapter answered to a few prompts, for a person to read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from nested_core.errors import naming_damaged_file
from nested_core.storage.atomic import canonical_json, write_bytes
from nested_core.storage.untrusted_files import read_regular

AnsweringRole = Literal["base", "parent", "champion", "candidate"]

BrokenHow = Literal["empty", "no_words", "repeated", "endless", "same"]
BROKEN_WORDS: Mapping[str, str] = {
    "empty": "empty",
    "no_words": "a single character or punctuation alone",
    "repeated": "one token or pair repeated",
    "endless": "without an end",
    "same": "the same to every prompt",
}


def shown_answer(text: str) -> str:
    """Strip the whitespace around an answer for display; an empty answer gives "(empty)"."""
    return text.strip() or "(empty)"


@dataclass(frozen=True)
class AnswerRecord:
    """One answer of one model to one question of one suite of `gate.tasks`.

    task: the name of the suite.
    model: which model answered: the base alone, the adapter that training started from (parent),
        the champion when the gate ran, or the adapter being judged (candidate).
    line: the question's line in the suite's file, counted from 1.
    question: the question's id or line number, and the start of its text.
    score: how right the answer is, from 0 to 1.
    tokens: how many tokens were generated; 0 for a multiple-choice question, which needs no
        generation.
    empty, endless, repeated: whether the answer has no text, was cut off at the token limit, or is
        one token over and over.
    seconds: the time that this model took for the whole suite, divided by the number of questions.
    same_prompt_as: the first line of the suite with the same prompt; None if this line is the
        first.
    expected: the right answers, shortened; None if the question has no fixed right answer, or if an
        earlier release wrote the file.
    chosen_among: how many checkpoints were compared by their scores on this suite to choose the
        candidate; 1 if the suite chose nothing. Set for the candidate's answers alone.
    """

    task: str
    model: AnsweringRole
    line: int
    question: str
    answer: str
    score: float
    tokens: int
    empty: bool
    endless: bool
    repeated: bool
    seconds: float
    same_prompt_as: int | None = None
    expected: str | None = None
    chosen_among: int = 1


_RECORD_VALIDATOR = TypeAdapter(AnswerRecord)


def write_answers(path: Path, records: Iterable[AnswerRecord]) -> None:
    """Write all answers to answers.jsonl, replacing the file atomically."""
    write_bytes(path, b"".join(canonical_json(asdict(record)) + b"\n" for record in records))


def read_answers(path: Path) -> Sequence[AnswerRecord]:
    """Read answers.jsonl; raise DamagedError for a line that is not an AnswerRecord."""
    lines = BytesIO(read_regular(path))
    with naming_damaged_file(path):
        return [_RECORD_VALIDATOR.validate_json(line, strict=True) for line in lines]


@dataclass(frozen=True)
class SampleAnswers:
    """One sample prompt with what the base, the parent and the trained adapter answered.

    expected: the answer in the data set; None for a prompt from the configuration.
    base, adapter: the answers of the base model and of the trained adapter.
    parent: the answer of the adapter that training started from; None for a fresh adapter, which
        answers as the base does.
    place: where the prompt comes from, such as `valid.jsonl:3`.
    base_broken, adapter_broken: how the answer is broken, as a key of BROKEN_WORDS; None for a
        sound answer. `endless` needs an expected answer of at most a quarter of the length; `same`
        is for the adapter alone.
    """

    prompt: str
    expected: str | None
    base: str
    parent: str | None
    adapter: str
    place: str
    base_broken: BrokenHow | None = None
    adapter_broken: BrokenHow | None = None


_SAMPLE_VALIDATOR = TypeAdapter(SampleAnswers)


def render_sample_answers(rows: Sequence[SampleAnswers]) -> bytes:
    """Return the bytes of sample-answers.jsonl: one JSON object per prompt and line."""
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode()


def read_sample_answers(path: Path) -> list[SampleAnswers]:
    """Read sample-answers.jsonl; raise DamagedError if it is missing or a line has another form."""
    with naming_damaged_file(path):
        return [_SAMPLE_VALIDATOR.validate_json(line) for line in BytesIO(read_regular(path))]
