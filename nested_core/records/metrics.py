"""metrics.jsonl: one JSON object a line, flushed at every report, truncated on resume."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from nested_core.errors import MissingFileError
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
COUNT_KEYS = ("step", "iteration", "trained_tokens", "replayed_tokens")
MAX_COUNT = 10**15
NUMERIC_KEYS = (
    *("loss", "val_loss", "learning_rate", "grad_norm", "clipped_grad_norm"),
    *("tokens_per_second", "iterations_per_second", "peak_memory_gb"),
)
SLOWEST = 1e-9  # iterations a second: one in thirty years
SMALLEST_NUMBER, LARGEST_NUMBER = 2.0**-149, 2.0**128  # float32's, in which losses are computed


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Append one record; a number that is not finite becomes null, as JSON has no word for it."""
    line = json.dumps(finite_or_none(record), allow_nan=False) + "\n"
    append_regular(path, line.encode())


def parse_record(line: bytes) -> dict[str, Any]:
    """The record of one line; ValueError if it is not one that `append_metrics` writes."""
    record = from_json(line, allow_inf_nan=False)
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    if has_repeated_key(line, len(collect_strings(record))):
        raise ValueError("a key is there twice")
    _require_numbers(record)
    samples = record.get("samples", [])
    if not isinstance(samples, list) or not all(map(_is_sample, samples)):
        raise ValueError("samples is no list of prompts with answers")
    tasks = record.get("tasks", {})
    if not isinstance(tasks, dict) or not all(map(_is_task, tasks.values())):
        raise ValueError("tasks is no mapping of suites to shares of right answers")
    return record


def _require_numbers(record: Mapping[str, Any]) -> None:
    """Raise ValueError for a number that no run reports."""
    for key in COUNT_KEYS:
        if not _is_count(record.get(key, 0)):
            raise ValueError(f"{key} is no count")
    for key in NUMERIC_KEYS:
        value = record.get(key)
        if value is not None and not _is_number(value):
            raise ValueError(f"{key} is no number, or one that no run reports")
    if (record.get("iterations_per_second") or 1.0) < SLOWEST:
        raise ValueError("iterations_per_second is below that of any run")
    for key in ("updates", "skipped"):
        counts = record.get(key, [])
        if not isinstance(counts, list) or not all(map(_is_count, counts)):
            raise ValueError(f"{key} is no list of counts")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or SMALLEST_NUMBER <= abs(value) < LARGEST_NUMBER


def _is_task(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_count(value.get("questions")):
        return False
    right = value.get("right")
    return isinstance(right, int | float) and _is_number(right) and 0 <= right <= 1


def describe_tasks(record: Mapping[str, Any]) -> str:
    """The answers to suites in a record: `prices 12 of 20 right`; empty without any."""
    return ", ".join(
        f"{name} {round(own['right'] * own['questions'], 1):g} of {own['questions']} right"
        for name, own in record.get("tasks", {}).items()
    )


def _is_sample(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("prompt", "answer")
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All sound records; a warning names lines that are damaged.

    A last line that a killed process left half-written is passed over without one. Raises
    DamagedError if something else than a file of at most 1 GiB stands there.
    """
    return [record for record in _iterate_records(path) if record is not None]


def read_latest_values(path: Path) -> dict[str, Any]:
    """The last value of each metric that is not null, as `read_metrics` reads them, one by one."""
    return latest_values(record for record in _iterate_records(path) if record is not None)


def latest_values(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The last value of each metric that is not null."""
    latest: dict[str, Any] = {}
    for record in records:
        latest.update((key, value) for key, value in record.items() if value is not None)
    return latest


def cumulative_seconds(records: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds spent in training steps up to each record, over all sessions, from its speed.

    Evaluations, checkpoints and pauses between sessions are left out.
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
    """Keep the first records, none after `last_step`; return how many there are.

    A damaged line among them is left out, with a warning that names it.
    """
    kept = [
        json.dumps(record)
        for number, record in enumerate(_iterate_records(path))
        if number < max_records and record is not None and record.get("step", 0) <= last_step
    ]
    write_bytes(path, "".join(line + "\n" for line in kept).encode())
    return len(kept)


def _iterate_records(path: Path) -> Iterator[dict[str, Any] | None]:
    """The record of each line, None for a damaged one; in the end a warning names these."""
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
    """The lines of the file as it is now, and whether each is ended; a too long one is empty."""
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
    listed = ", ".join(map(str, damaged[:MAX_LISTED_DAMAGED_LINES]))
    more = (
        f" and {len(damaged) - MAX_LISTED_DAMAGED_LINES} more"
        if len(damaged) > MAX_LISTED_DAMAGED_LINES
        else ""
    )
    warnings.warn(
        f"{path}: {len(damaged)} of {lines} lines are damaged and left out: line {listed}"
        f"{more}. The reports before and after them are kept.",
        stacklevel=4,
    )
