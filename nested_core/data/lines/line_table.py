"""Read a range of lines of a JSONL file to a polars frame with one row for each line.

Blank and invalid lines have a row too; texts are not kept. One worker process reads one range.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nested_core import seams
from nested_core.data.lines.example_parsing import (
    BLANK_TURN_PATTERN,
    FieldNames,
    formats_of_plain_rows,
    parse_plain_row,
)
from nested_core.data.lines.line_rows import LineRow, fold_text, parse_line_to_row
from nested_core.data.parallel_jobs import ByteRange
from nested_core.data.room_checks import AskedTexts, NearDuplicates, RowChecks
from nested_core.errors import DatasetError
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

NEAR_DUPLICATES_KEY = "data_policy.near_duplicates"
RANGE_BYTES = 2 * 2**20
LINE_SCHEMA: dict[str, type[pl.DataType]] = {
    "format": pl.Categorical,
    "roles": pl.Categorical,
    "content": pl.UInt64,  # the first 64 bits of its SHA-256: what finds equal rows
    "prompt": pl.UInt64,  # equal for equal prompts
    "answer": pl.UInt64,  # equal for equal answers
    "folded": pl.UInt64,  # equal for contents that `fold_text` makes equal
    "has_control": pl.Boolean,
    "has_replacement": pl.Boolean,
    "has_error_cell": pl.Boolean,  # a turn, or plain text, is nothing else
    "has_crlf": pl.Boolean,
    "has_mark": pl.Boolean,  # begins with a byte-order mark
    "is_blank": pl.Boolean,
    "blank_field": pl.Categorical,
    "unknown_keys": pl.Categorical,
    "check": pl.Categorical,
    "message": pl.Categorical,
}
_CONTROL_CHARACTER_PATTERN = r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
_REPLACEMENT_CHARACTER = "\ufffd"
# What spreadsheets write where a formula fails (Excel, LibreOffice, Google), and programs where a
# number is missing; as one of the texts that LineRow.content joins by NUL.
_ERROR_CELL_PATTERN = (
    r"(?:^|\x00)\s*(?:#(?:N/A|REF!|NAME\?|DIV/0!|VALUE!|NULL!|NUM!|SPILL!|CALC!|ERROR!)|Err:\d{3}|NaN)"
    r"\s*(?:\x00|$)"
)


@dataclass(frozen=True, eq=False)
class LineRange:
    """What was read from a range of lines.

    frame: a row for each line, see LINE_SCHEMA, with the columns of rooms' RowChecks; with
        n-gram columns of the room near_duplicates if asked for.
    digests: the SHA-256 of each example, concatenated.
    answer_keys: the smallest and the largest hash of an answer, which are equal if all answers are.
    shared: which n-grams the texts share with those asked for, as that room defines it; None if
        nothing was asked for.
    examples: how many examples have n-grams.
    """

    frame: pl.DataFrame
    digests: bytes
    answer_keys: frozenset[int]
    shared: pl.DataFrame | None = None
    examples: int = 0


def read_line_range(
    path: Path,
    byte_range: ByteRange,
    field_names: FieldNames,
    *,
    has_ngrams: bool = False,
    asked: AskedTexts | None = None,
) -> LineRange:
    """Read a range of a file's lines to a table with one row a line, independently of other ranges.

    Parsing, hashing and searching happen here, so that ranges can be read in several processes.

    has_ngrams: add columns with hashes of each text's n-grams, for finding near-duplicates.
    asked: n-grams of other texts (of held-out rows) to look for in these lines; None for none.

    Raises OSError, and DatasetError if the file became shorter.
    """
    size = byte_range.end - byte_range.start
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _):
        file.seek(byte_range.start)
        content = file.read(size)
    if len(content) < size:
        raise DatasetError(f"{path} became shorter while it was read. Start again.")
    # One row for each line, with the keys that find related rows
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    is_start = byte_range.start == 0
    rows = _read_rows(lines, field_names, is_start=is_start, may_be_plain=b"\\u0000" not in content)
    digests, keys = _digests_and_keys(rows.pop("content"))
    # Smallest and largest hash of an answer suffice to tell whether all answers are the same
    answers = keys["answer"].drop_nulls().to_numpy()
    answer_keys = frozenset(map(int, (answers.min(), answers.max()) if len(answers) else ()))
    # What the rules ask about each line's texts
    raw = pl.Series(lines, dtype=pl.Binary)
    shown: list[str | None] = rows.pop("shown")
    text = pl.Series(shown, dtype=pl.String)
    has_mark = np.zeros(len(lines), bool)  # a byte order mark, which only the first line can have
    has_mark[:1] = is_start and lines[0].startswith(codecs.BOM_UTF8)
    columns: dict[str, Any] = {
        **rows,
        **keys,
        "has_control": _find_control_characters(raw, text),
        "has_replacement": text.str.contains(_REPLACEMENT_CHARACTER, literal=True).fill_null(
            value=False
        ),
        "has_error_cell": text.str.contains(_ERROR_CELL_PATTERN).fill_null(value=False),
        "has_crlf": raw.bin.ends_with(b"\r"),
        "has_mark": has_mark,
    }
    frame = pl.DataFrame(columns, schema=LINE_SCHEMA)
    for part in seams.load_all(RowChecks):
        frame = frame.with_columns(**part.find(text))
    if has_ngrams:
        near = seams.load_only(NearDuplicates, NEAR_DUPLICATES_KEY)
        frame = frame.with_columns(**near.hash_texts(shown))
    if asked is None:
        return LineRange(frame, digests, answer_keys)
    return LineRange(frame, digests, answer_keys, *asked.find_in(shown, frame["content"]))


def run_line_range_job(request: dict[str, Any]) -> dict[str, object]:
    """Read a range of lines in a worker process; write the table to files, return small results.

    request: the arguments of `read_line_range` as JSON values; request["out"] is the beginning of
        the files' names: OUT.rows (the table), OUT.digests (a SHA-256 for each example) and
        OUT.shared (n-grams that were looked for and found). Columns that are all null are left out.
    """
    read = read_line_range(
        Path(request["path"]),
        ByteRange(*request["byte_range"]),
        FieldNames(**request["field_names"]),
        has_ngrams=request["has_ngrams"],
        asked=_read_asked(request["asked"]) if request["asked"] else None,
    )
    frame = read.frame.select(column for column in read.frame if column.null_count() < len(column))
    frame.write_ipc(f"{request['out']}.rows", compression="lz4")
    Path(f"{request['out']}.digests").write_bytes(read.digests)
    if read.shared is not None:
        read.shared.write_ipc(f"{request['out']}.shared")
    keys = [*read.answer_keys]
    return {"rows": read.frame.height, "examples": read.examples, "answer_keys": keys}


@lru_cache(maxsize=1)  # its tables serve all ranges that this process reads
def _read_asked(path: str) -> AskedTexts:
    """Read the n-grams to look for from a file, once per process."""
    return seams.load_only(NearDuplicates, NEAR_DUPLICATES_KEY).read_asked(Path(path))


def _read_rows(
    lines: list[bytes], field_names: FieldNames, *, is_start: bool, may_be_plain: bool
) -> dict[str, list[Any]]:
    """Parse lines to columns: by field of `LineRow`, the values of all lines.

    is_start: whether the first line is the first of the file.
    may_be_plain: whether the fast parser may be used. It knows plain rows alone; each line that it
        does not take, or whose turns may be blank, is parsed by the complete parser.
    """
    columns = {name: [default] * len(lines) for name, default in LineRow._field_defaults.items()}
    formats = formats_of_plain_rows(field_names) if may_be_plain else ()
    plain = [parse_plain_row(raw, field_names) if formats else None for raw in lines]
    if len(formats) == 1:  # data_format asks for one format: the complete parser refuses others
        plain = [row if row and row[0] in formats else None for row in plain]
    columns["format"] = [row and row[0] for row in plain]
    columns["roles"] = [row and row[1] for row in plain]
    columns["content"] = [row and row[2] for row in plain]
    columns["shown"] = list(columns["content"])
    # A line without content is one that the fast parser did not take
    is_doubtful = pl.Series(columns["content"], dtype=pl.String).str.contains(BLANK_TURN_PATTERN)
    for index in is_doubtful.fill_null(value=True).arg_true().to_list():
        row = parse_line_to_row(lines[index], field_names, is_first=is_start and index == 0)
        for name, value in row._asdict().items():
            columns[name][index] = value
    return columns


def _digests_and_keys(contents: list[str | None]) -> tuple[bytes, dict[str, pl.Series]]:
    """Return the examples' SHA-256, concatenated, and the keys by which rows are compared.

    contents: each line's roles and texts joined by NUL, the answer last; None for a line without an
        example.

    A key is a 64-bit hash, one for each line: `content` (0 for no example), `prompt` (all before
    the answer), `answer`, and `folded` (the content, see `fold_text`).
    """
    encoded = [None if content is None else content.encode() for content in contents]
    digests = b"".join([sha256(content).digest() for content in encoded if content is not None])
    parts = [None if content is None else content.rpartition(b"\0") for content in encoded]
    prompts = [(part[0] or None) if part else None for part in parts]  # plain text has none
    answers = [part[2] if part else None for part in parts]
    is_example = pl.Series(encoded, dtype=pl.Binary).is_not_null()
    # The first 8 of the 32 bytes of each SHA-256
    content = np.zeros(len(contents), np.uint64)
    content[is_example.to_numpy()] = np.frombuffer(digests, "<u8")[::4]
    keys = {
        "content": pl.Series(content),
        "prompt": _hash_to_keys(prompts),
        "answer": _hash_to_keys(answers),
        "folded": _hash_to_keys([one and fold_text(one) for one in encoded]),
    }
    return digests, keys


def _hash_to_keys(values: list[bytes | None]) -> pl.Series:
    """Hash each value to 64 bits, the same in every process; null for None."""
    series = pl.Series(values, dtype=pl.Binary)
    return pl.select(pl.when(series.is_not_null()).then(series.hash(seed=0))).to_series()


def _find_control_characters(raw: pl.Series, text: pl.Series) -> pl.Series:
    """Return for each text whether it has a control character.

    Only suspicious lines are searched.
    """
    may = (text.str.len_bytes() != text.str.len_chars()) | raw.bin.contains(b"\x7f")
    for escape in (b"\\u", b"\\b", b"\\f"):
        may |= raw.bin.contains(escape)
    has = np.zeros(len(raw), bool)
    where = may.fill_null(value=False).arg_true()
    has[where.to_numpy()] = text.gather(where).str.contains(_CONTROL_CHARACTER_PATTERN).to_numpy()
    return pl.Series(has)
