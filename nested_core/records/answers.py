"""What models answered: answers.jsonl to the questions of `gate.tasks`, a line an answer.

sample-answers.jsonl has what base and adapter answered to a few prompts, to read and to judge.
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
    """An answer without the space around it; of one without anything to read, that it is empty."""
    return text.strip() or "(empty)"


@dataclass(frozen=True)
class AnswerRecord:
    """One answer of one model to one question of one suite.

    model: the base alone, the adapter that training went on from, the champion at the time of the
        gate, or the adapter that is judged.
    question: its id or line and what it asks, shortened; `line` is counted from 1.
    score: how right the answer is, from 0 to 1.
    tokens: how many were generated; 0 for a choice, which is not generated.
    empty, endless, repeated: there is nothing to read, it was cut off, it is one token repeated.
    seconds: the suite's time with this model, divided by its questions.
    same_prompt_as: the first line of the suite with the same prompt; None for that line itself.
    expected: the right answers, shortened; None without a right answer, or from an earlier release.
    chosen_among: of the candidate's: the steps among which this suite's questions chose it; 1 where
        they chose nothing.
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
    """Write answers.jsonl whole, in place of an earlier one."""
    write_bytes(path, b"".join(canonical_json(asdict(record)) + b"\n" for record in records))


def read_answers(path: Path) -> Sequence[AnswerRecord]:
    """Read answers.jsonl; DamagedError if it is not what the gate wrote."""
    lines = BytesIO(read_regular(path))
    with naming_damaged_file(path):
        return [_RECORD_VALIDATOR.validate_json(line, strict=True) for line in lines]


@dataclass(frozen=True)
class SampleAnswers:
    """A prompt and its answers.

    expected: the data set's own answer; None for a configured prompt.
    base, adapter: what the base model and the trained adapter answered.
    parent: the adapter that training went on from; None for a fresh one, which is the base.
    place: where the prompt comes from, such as `valid.jsonl:3`.
    base_broken, adapter_broken: how the answer is broken: empty, no words, one token or pair
        repeated, without an end where the expected one is a quarter as long, or, of the adapter,
        the same to every prompt; None for a sound answer.
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
    """The content of the file."""
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode()


def read_sample_answers(path: Path) -> list[SampleAnswers]:
    """The answers in a run's file; DamagedError if it is missing or holds anything else."""
    with naming_damaged_file(path):
        return [_SAMPLE_VALIDATOR.validate_json(line) for line in BytesIO(read_regular(path))]
