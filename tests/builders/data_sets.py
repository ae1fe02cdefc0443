"""Data sets on disk, written a line at a time, and what the loader makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nested_core.config.sections import DataPolicy
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.records.dataset import DatasetReport
from nested_core.storage.user_cache import UserCache

Found = tuple[str, int | None, str]  # the file, the line and the check of a finding


def chat(question: str, answer: Any, **more: Any) -> dict[str, Any]:
    """A conversation of one question and its answer."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


GOOD = [chat(f"Where is {place}?", f"In {place}land.") for place in "ABCD"]
HELD_OUT = [chat("Where is Z?", "In Zland.")]


def json_lines(lines: Iterable[Any]) -> bytes:
    """A line each: bytes as they are, or a value as JSON."""
    raw = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return b"".join(line + b"\n" for line in raw)


def write_lines(path: Path, lines: Iterable[Any]) -> Path:
    """Write a file of these lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json_lines(lines))
    return path


def load(
    folder: Path,
    tokenizer: TokenizerSource | None = None,
    *,
    policy: dict[str, Any] | None = None,
    cache: UserCache | None = None,
    **settings: Any,
) -> tuple[DatasetReport, dict[str, TokenizedSplit]]:
    """Judge a data set, and tokenise it where there is a tokenizer."""
    chosen = DataSettings(str(folder), policy=DataPolicy(**policy or {}), **settings)
    report, splits = load_dataset(chosen, tokenizer, cache=cache)
    return report, dict(splits)


def found_in(report: DatasetReport, severity: str = "error") -> list[Found]:
    """The findings of a severity, in order."""
    return [(f.file, f.line, f.check) for f in report.findings if f.severity == severity]


def errors_in(
    folder: Path, tokenizer: TokenizerSource | None = None, **settings: Any
) -> list[Found]:
    """The errors of a data set under these settings."""
    return found_in(load(folder, tokenizer, **settings)[0])


def warnings_in(
    folder: Path, tokenizer: TokenizerSource | None = None, **settings: Any
) -> list[Found]:
    """The warnings of a data set under these settings."""
    return found_in(load(folder, tokenizer, **settings)[0], "warning")
