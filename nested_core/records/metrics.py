"""metrics.jsonl: a run's training metrics, one JSON object a report.

Each report is appended and flushed; on resume the file is cut back to the checkpoint.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter
from pydantic_core import from_json
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from nested_core.errors import MissingFileError, list_first
from nested_core.storage.atomic import finite_or_none, write_bytes
from nested_core.storage.untrusted_files import (
    append_regular,
    collect_strings,
    has_repeated_key,
    open_regular,
)

MAX_METRICS_BYTES = 2**30
MAX_RECORD_BYTES = 16 * 2**20
MAX_LISTED_DAMAGED_LINES = 5
MAX_COUNT = 10**15
SLOWEST = 1e-9  # iterations a second: one in thirty years
SMALLEST_NUMBER, LARGEST_NUMBER = 2.0**-149, 2.0**128  # float32's, in which losses are computed


def _require_float32(value: float) -> float:
    """Return a number that float32 can represent; raise ValueError for any other."""
    if value and not SMALLEST_NUMBER <= abs(value) < LARGEST_NUMBER:
        raise ValueError("beyond any number that a run reports")
    return value


def _require_possible_speed(value: float) -> float:
    """Return a speed in iterations per second; raise ValueError for one too low for any run."""
    if value and value < SLOWEST:
        raise ValueError("below the speed of any run")
    return value


_Count = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)]
_Number = Annotated[float, Field(strict=True), AfterValidator(_require_float32)]


class _Sample(TypedDict):
    """A sample prompt and its answer, in a record."""

    prompt: str
    answer: str


class _Task(TypedDict):
    """The score on a suite, in a record: the share of right answers, and how many questions."""

    right: Annotated[_Number, Field(ge=0, le=1)]
    questions: _Count


class _Record(TypedDict, total=False):
    """The keys of a record that are type-checked before use; other keys are allowed unchecked."""

    step: _Count
    iteration: _Count
    trained_tokens: _Count
    replayed_tokens: _Count
    loss: _Number | None
    val_loss: _Number | None
    learning_rate: _Number | None
    grad_norm: _Number | None
    clipped_grad_norm: _Number | None
    tokens_per_second: _Number | None
    iterations_per_second: Annotated[_Number, AfterValidator(_require_possible_speed)] | None
    peak_memory_gb: _Number | None
    updates: list[_Count]
    skipped: list[_Count]
    samples: list[_Sample]
    tasks: dict[str, _Task]


_RECORD_VALIDATOR = TypeAdapter(_Record)


def append_metrics(path: Path, record: dict[str, object]) -> None:
    """Append one record as a line; a number that is not finite is written as null."""
    line = json.dumps(finite_or_none(record), allow_nan=False) + "\n"
    append_regular(path, line.encode())


def parse_record(line: bytes) -> dict[str, object]:
    """Parse one line of metrics.jsonl; raise ValueError if it has another form."""
    record = from_json(line, allow_inf_nan=False)
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    if has_repeated_key(line, len(collect_strings(record))):
        raise ValueError("a key is there twice")
    _RECORD_VALIDATOR.validate_python(record)
    return record


def describe_tasks(record: Mapping[str, Any]) -> str:
    """Describe the scores on suites in a record: `prices 12 of 20 right`; "" without scores."""
    return ", ".join(
        f"{name} {round(task['right'] * task['questions'], 1):g} of {task['questions']} right"
        for name, task in record.get("tasks", {}).items()
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all valid records of metrics.jsonl; warn with the numbers of damaged lines.

    A last line that a killed process left half-written is skipped without a warning. Without the
    file the list is empty. Raises DamagedError for anything other than a regular file of at most 1
    GiB.
    """
    return [record for record in _iterate_records(path) if record is not None]


def latest_values(records: Iterable[Mapping[str, object]]) -> dict[str, Any]:
    """Return the last value of each metric that is not null."""
    latest: dict[str, object] = {}
    for record in records:
        latest.update((key, value) for key, value in record.items() if value is not None)
    return latest


def cumulative_seconds(records: Sequence[dict[str, Any]]) -> list[float]:
    """Return the seconds spent in training steps up to each record, over all processes of the run.

    Computed from iterations and `iterations_per_second`, so evaluations, checkpoints and pauses
    between processes are not counted.
    """
    seconds = []
    passed, done = 0.0, 0
    for record in records:
        speed = record.get("iterations_per_second")
        if speed:
            iteration = record.get("iteration", done)
            passed += (iteration - done) / speed
            done = iteration
        seconds.append(passed)
    return seconds


def truncate_metrics(path: Path, last_step: int, max_records: int) -> int:
    """Rewrite metrics.jsonl with its first records up to `last_step`; return how many there are.

    A damaged line among them is dropped with a warning. max_records: how many lines to keep at
    most.
    """
    kept = [
        json.dumps(record)
        for number, record in enumerate(_iterate_records(path))
        if number < max_records and record is not None and record.get("step", 0) <= last_step
    ]
    write_bytes(path, "".join(line + "\n" for line in kept).encode())
    return len(kept)


def _iterate_records(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the record of each line, None for a damaged line; then warn of the damaged lines."""
    damaged: list[int] = []
    ended = 0
    for line, is_ended in _iterate_lines(path):
        ended += int(is_ended)
        try:
            yield parse_record(line)
        except (ValueError, RecursionError):
            if is_ended:
                damaged.append(ended)
                yield None
    if damaged:
        _warn_of_damaged_lines(path, damaged, ended)


def _iterate_lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Yield the lines that the file has now, and whether each ends with a newline.

    A line longer than MAX_RECORD_BYTES is yielded as empty.
    """
    try:
        with open_regular(path, MAX_METRICS_BYTES) as (file, size):
            while file.tell() < size:
                line = file.readline(min(MAX_RECORD_BYTES, size - file.tell()))
                is_too_long = len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n")
                while is_too_long and not line.endswith(b"\n") and line:
                    line = file.readline(min(MAX_RECORD_BYTES, size - file.tell()))
                if not line:  # it became shorter
                    return
                yield b"" if is_too_long else line, line.endswith(b"\n")
    except MissingFileError:
        return


def _warn_of_damaged_lines(path: Path, damaged: Sequence[int], lines: int) -> None:
    """Warn that lines of metrics.jsonl are damaged; `damaged` has their numbers, counted from 1."""
    listed = ", ".join(list_first(map(str, damaged), MAX_LISTED_DAMAGED_LINES))
    warnings.warn(
        f"{path}: {len(damaged)} of {lines} lines are damaged and left out: line {listed}. The "
        f"reports before and after them are kept.",
        stacklevel=4,
    )
