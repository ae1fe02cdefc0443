"""sample-answers.jsonl: what base and adapter answered to a few prompts, to read and to judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from nested_core.errors import DamagedError
from nested_core.storage.strict_files import read_regular

BrokenHow = Literal["empty", "repeated", "endless"]


@dataclass(frozen=True)
class SampleAnswers:
    """A prompt and its answers.

    expected: the data set's own answer; None for a configured prompt.
    base, adapter: what the base model and the trained adapter answered.
    parent: the adapter that training went on from; None for a fresh one, which is the base.
    place: where the prompt comes from, such as `valid.jsonl:3`.
    base_broken, adapter_broken: how the answer is broken: empty, one token or pair repeated to the
        end, or without an end where the expected one is a quarter as long; None where it is not.
    """

    prompt: str
    expected: str | None
    base: str
    parent: str | None
    adapter: str
    place: str
    base_broken: BrokenHow | None = None
    adapter_broken: BrokenHow | None = None


_RECORD_VALIDATOR = TypeAdapter(SampleAnswers)


def render_sample_answers(rows: Sequence[SampleAnswers]) -> bytes:
    """The content of the file."""
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows).encode()


def read_sample_answers(path: Path) -> list[SampleAnswers]:
    """The answers in a run's file; DamagedError if it is missing or holds anything else."""
    try:
        return [_RECORD_VALIDATOR.validate_json(line) for line in BytesIO(read_regular(path))]
    except ValidationError as error:
        raise DamagedError(f"{path} does not hold answers to prompts.") from error
