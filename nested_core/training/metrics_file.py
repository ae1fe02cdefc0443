"""metrics.jsonl: one JSON object a line, flushed at every report, truncated on resume."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nested_core.errors import MissingFileError
from nested_core.storage.atomic import finite_or_none, write_bytes
from nested_core.storage.strict_files import append_regular, parse_json, read_regular

MAX_METRICS_BYTES = 2**30
MAX_LISTED_DAMAGED_LINES = 5
NUMERIC_KEYS = (
    *("step", "iteration", "loss", "val_loss", "learning_rate", "grad_norm", "clipped_grad_norm"),
    *("trained_tokens", "tokens_per_second", "iterations_per_second", "peak_memory_gb"),
)


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Append one record; a number that is not finite becomes null, as JSON has no word for it."""
    line = json.dumps(finite_or_none(record), allow_nan=False) + "\n"
    append_regular(path, line.encode())


def parse_record(line: bytes) -> dict[str, Any]:
    """The record of one line; ValueError if it is not one that `append_metrics` writes."""
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    for key in NUMERIC_KEYS:
        value = record.get(key, 0)
        is_null = value is None and key not in ("step", "iteration")
        if not is_null and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{key} is no number")
    samples = record.get("samples", [])
    if not isinstance(samples, list) or not all(map(_is_sample, samples)):
        raise ValueError("samples is no list of prompts with answers")
    return record


def _is_sample(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() >= {"prompt", "answer"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All sound records; a warning names lines that are damaged.

    A last line that a killed process left half-written is passed over without one. Raises
    DamagedError if something else than a file of at most 1 GiB stands there.
    """
    return [record for record in _read_lines(path) if record is not None]


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
        record
        for record in _read_lines(path)[:max_records]
        if record is not None and record.get("step", 0) <= last_step
    ]
    write_bytes(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return len(kept)


def _read_lines(path: Path) -> list[dict[str, Any] | None]:
    """The record of each line, None for a damaged one."""
    try:
        content = read_regular(path, MAX_METRICS_BYTES)
    except MissingFileError:
        return []
    *lines, torn = content.split(b"\n")
    records = [_record_or_none(line) for line in lines]
    damaged = [number for number, record in enumerate(records, 1) if record is None]
    if damaged:
        listed = ", ".join(map(str, damaged[:MAX_LISTED_DAMAGED_LINES]))
        more = (
            f" and {len(damaged) - MAX_LISTED_DAMAGED_LINES} more"
            if len(damaged) > MAX_LISTED_DAMAGED_LINES
            else ""
        )
        warnings.warn(
            f"{path}: {len(damaged)} of {len(lines)} lines are damaged and left out: line {listed}"
            f"{more}. The reports before and after them are kept.",
            stacklevel=3,
        )
    last = _record_or_none(torn)
    return records if last is None else [*records, last]


def _record_or_none(line: bytes) -> dict[str, Any] | None:
    try:
        return parse_record(line)
    except ValueError:
        return None
