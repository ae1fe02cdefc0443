"""A range of lines of a JSONL file -> a frame with one flat row for each physical line.

Blank and bad lines have a row too. Keeps no text; the work of one process among several.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nested_core.data.lines.decoding import LineProblem
from nested_core.data.lines.fields import Example, Features
from nested_core.data.lines.parsing import parse_line
from nested_core.data.lines.rows import (
    BLANK_TURN,
    WHITE_SPACE,
    Row,
    line_body,
    plain_row,
    read_line,
)
from nested_core.data.lines.sensitive import find_kinds
from nested_core.data.workers import Span
from nested_core.errors import DatasetError

SPAN_BYTES = 4 * 2**20
SCHEMA: dict[str, type[pl.DataType]] = {
    "format": pl.Categorical,
    "roles": pl.Categorical,
    "content": pl.UInt64,  # the first 64 bits of its SHA-256: what finds equal rows
    "prompt": pl.UInt64,  # equal for equal prompts
    "folded": pl.UInt64,  # equal for contents that differ in case and white space only
    "sensitive": pl.UInt32,  # what it may hold, see sensitive.KINDS
    "has_control": pl.Boolean,
    "has_replacement": pl.Boolean,
    "has_crlf": pl.Boolean,
    "has_mark": pl.Boolean,  # begins with a byte-order mark
    "is_blank": pl.Boolean,
    "blank_field": pl.Categorical,
    "unknown_keys": pl.Categorical,
    "check": pl.Categorical,
    "message": pl.String,
}
_SLOW_COLUMNS = ("blank_field", "unknown_keys", "is_blank", "check", "message")
_LOWER = bytes(range(256)).lower()
_CONTROL = r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
_REPLACEMENT = "\ufffd"


def read_span(path: Path, span: Span, features: Features) -> tuple[pl.DataFrame, bytes]:
    """The rows of a range of lines, see SCHEMA, and the SHA-256 of each example in it, joined.

    What it gives for a line does not depend on the range it is read in. Raises OSError, and
    DatasetError where the file became shorter.
    """
    with path.open("rb") as file:
        file.seek(span.start)
        content = file.read(span.end - span.start)
    if len(content) < span.end - span.start:
        raise DatasetError(f"{path} became shorter while it was read. Start again.")
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    may_be_plain = b"\\u0000" not in content
    return _frame(lines, features, is_start=span.start == 0, may_be_plain=may_be_plain)


def read_job(request: dict[str, Any]) -> dict[str, Any]:
    """`read_span` as a job of a worker: writes OUT.rows and OUT.digests, answers how many lines."""
    span, features = Span(*request["span"]), Features(**request["features"])
    frame, digests = read_span(Path(request["path"]), span, features)
    frame.write_ipc(f"{request['out']}.rows")
    Path(f"{request['out']}.digests").write_bytes(digests)
    return {"lines": frame.height}


def read_examples(
    path: Path, features: Features, skip: set[int], span: Span | None = None, first_line: int = 1
) -> Iterator[tuple[int, Example]]:
    """Yield (line, example) for each sound line: not blank, not one to skip; of a range, or all.

    `first_line` is the number of the range's first line. Raises DatasetError where such a line is
    sound no more: the file changed since it was judged.
    """
    with path.open("rb") as file:
        file.seek(span.start if span else 0)
        left = span.end - span.start if span else None
        for line, raw in enumerate(file, start=first_line):
            if left is not None and (left := left - len(raw)) < 0:
                return
            body = line_body(raw, is_first=line == 1)
            if not body or line in skip:
                continue
            try:
                yield line, parse_line(body, features)
            except LineProblem as problem:
                reason = f"{path}:{line} changed while it was read: {problem}. Start again."
                raise DatasetError(reason) from None


@dataclass(frozen=True)
class _Columns:
    """What was read of each line; of those that are not plain the whole row, by index."""

    formats: list[str | None]
    roles: list[str | None]
    contents: list[str | None]
    shown: list[str | None]
    slow: dict[int, Row]


def _read_lines(
    lines: list[bytes], features: Features, *, is_start: bool, may_be_plain: bool
) -> _Columns:
    plain = [plain_row(raw, features) if may_be_plain else None for raw in lines]
    formats: list[str | None] = [row and row[0] for row in plain]
    roles: list[str | None] = [row and row[1] for row in plain]
    contents: list[str | None] = [row and row[2] for row in plain]
    is_doubtful = pl.Series(contents, dtype=pl.String).str.contains(BLANK_TURN)
    slow = {
        index: read_line(lines[index], features, is_first=is_start and index == 0)
        for index in is_doubtful.fill_null(value=True).arg_true().to_list()
    }
    shown = list(contents)
    for index, row in slow.items():
        formats[index], roles[index], contents[index] = row.format, row.roles, row.content
        shown[index] = row.shown
    return _Columns(formats, roles, contents, shown, slow)


def _frame(
    lines: list[bytes], features: Features, *, is_start: bool, may_be_plain: bool
) -> tuple[pl.DataFrame, bytes]:
    read = _read_lines(lines, features, is_start=is_start, may_be_plain=may_be_plain)
    digests, keys = _compare_by(read.contents)
    raw, text = pl.Series(lines, dtype=pl.Binary), pl.Series(read.shown, dtype=pl.String)
    has_mark = np.zeros(len(lines), bool)
    has_mark[:1] = is_start and lines[0].startswith(codecs.BOM_UTF8)
    columns: dict[str, Any] = {"format": read.formats, "roles": read.roles, **keys}
    columns |= {
        "sensitive": find_kinds(text),
        "has_control": _hold_controls(raw, text),
        "has_replacement": text.str.contains(_REPLACEMENT, literal=True).fill_null(value=False),
        "has_crlf": raw.bin.ends_with(b"\r"),
        "has_mark": has_mark,
    }
    for name in _SLOW_COLUMNS:
        columns[name] = _spread(read.slow, name, len(lines))
    return pl.DataFrame(columns, schema=SCHEMA), digests


def _compare_by(contents: list[str | None]) -> tuple[bytes, dict[str, pl.Series]]:
    """The digests of the examples, joined, and the keys by which rows are compared."""
    encoded = [None if content is None else content.encode() for content in contents]
    digests = b"".join([sha256(content).digest() for content in encoded if content is not None])
    prompts = [
        (content.rpartition(b"\0")[0] or None) if content else None  # plain text has none
        for content in encoded
    ]
    is_example = pl.Series(encoded, dtype=pl.Binary).is_not_null()
    content = np.zeros(len(contents), np.uint64)
    content[is_example.to_numpy()] = np.frombuffer(digests, "<u8")[::4]
    keys = {
        "content": pl.Series(content),
        "prompt": _keys(prompts),
        "folded": _keys(_fold(encoded)),
    }
    return digests, keys


def _fold(encoded: list[bytes | None]) -> list[bytes | None]:
    """The contents in small letters and without white space."""
    return [
        None
        if content is None
        else (content if content.isascii() else _casefold(content)).translate(_LOWER, WHITE_SPACE)
        for content in encoded
    ]


def _casefold(content: bytes) -> bytes:
    return content.decode().casefold().encode()


def _keys(values: list[bytes | None]) -> pl.Series:
    """A 64-bit key for each value, the same in every process; null for None."""
    series = pl.Series(values, dtype=pl.Binary)
    return pl.select(pl.when(series.is_not_null()).then(series.hash(seed=0))).to_series()


def _hold_controls(raw: pl.Series, text: pl.Series) -> pl.Series:
    """Whether a text holds a control character; most lines cannot, and are not searched."""
    may = (text.str.len_bytes() != text.str.len_chars()) | raw.bin.contains(b"\x7f")
    for escape in (b"\\u", b"\\b", b"\\f"):
        may |= raw.bin.contains(escape)
    has = np.zeros(len(raw), bool)
    where = may.fill_null(value=False).arg_true()
    has[where.to_numpy()] = text.gather(where).str.contains(_CONTROL).to_numpy()
    return pl.Series(has)


def _spread(slow: dict[int, Row], name: str, height: int) -> list[Any]:
    values: list[Any] = [False if name == "is_blank" else None] * height
    for index, row in slow.items():
        values[index] = getattr(row, name)
    return values
