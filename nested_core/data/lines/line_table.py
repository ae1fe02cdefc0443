"""A range of lines of a JSONL file -> a polars frame with one flat row for each physical line.

A row is what the rules need to know of a line, and its text to compare. Blank and bad lines have a
row too: what is wrong with a line stands in its row. The frame keeps no text. The work of one
process among several.
"""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from pydantic_core import from_json

from nested_core.data.lines.example_parsing import (
    WHITE_SPACE,
    Example,
    FieldNames,
    is_tool_calling_message,
    parse_line,
    strip_line,
)
from nested_core.data.lines.json_decoding import (
    LineProblem,
    collect_strings,
    has_repeated_key,
)
from nested_core.data.lines.sensitive_data import find_sensitive_pattern_bits
from nested_core.data.lines.word_ngrams import AskedNgrams, WordHasher, hash_word_ngrams
from nested_core.data.parallel_jobs import ByteRange
from nested_core.errors import DatasetError
from nested_core.storage.strict_files import UNBOUNDED, open_regular

_LETTER_BY_ROLE = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}
# A turn without a text, in the content of a plain row: all that str.isspace takes for space.
BLANK_TURN_PATTERN = r"\x00[\s\x1c-\x1f]*(?:\x00|$)"
_TOOL_CALL_LETTER = "c"
_ORPHAN_RESULT_LETTER = "o"
_OTHER_ROLE_LETTER = "x"
_as_json = json.JSONEncoder(ensure_ascii=False).encode


class LineRow(NamedTuple):
    """One line. `content` is all that is tokenised as one text, `shown` the texts in it."""

    format: str | None = None  # None: blank, or no example in it
    # A letter a turn: s(ystem), u(ser), a(ssistant), t(ool), c(all), o(rphan result), x (other).
    roles: str | None = None
    content: str | None = None
    shown: str | None = None
    blank_field: str | None = None
    unknown_keys: str | None = None
    is_blank: bool = False
    check: str | None = None  # the failed check, where the line holds no example
    message: str | None = None


def parse_plain_row(raw: bytes, field_names: FieldNames) -> tuple[str, str, str] | None:
    """(format, roles, content) of a line as almost all are, in one pass; None for all others.

    Its caller looks at many lines at once for what is left out here: the line must not hold an
    escaped NUL, and a content in which BLANK_TURN_PATTERN is found is for `parse_line_to_row` to
    judge.
    """
    try:
        row = from_json(raw, cache_strings="keys")
        messages = row.get(field_names.chat)
        if messages is None:
            return _read_plain_fields(raw, row, field_names)
        roles = "".join([_LETTER_BY_ROLE[message["role"]] for message in messages])
        content = "\0".join([roles, *[message["content"] for message in messages]])
    except (ValueError, TypeError, KeyError, AttributeError):  # not the shape of a plain line
        return None
    # Had a turn or the line any other key, there would be more strings than these.
    if not messages or has_repeated_key(raw, 1 + 4 * len(messages)):
        return None
    return "chat", roles, content


def _read_plain_fields(
    raw: bytes, row: dict[str, str], field_names: FieldNames
) -> tuple[str, str, str] | None:
    """What `parse_plain_row` gives for a completion or a text; TypeError if a value is no text."""
    if has_repeated_key(raw, 2 * len(row)):
        return None
    if len(row) == 2 and field_names.prompt in row and field_names.completion in row:
        return (
            "completion",
            "ua",
            "\0".join(["ua", row[field_names.prompt], row[field_names.completion]]),
        )
    if len(row) == 1 and field_names.text in row:
        text = row[field_names.text]
        return None if not text or text.isspace() else ("text", "", text)
    return None


def parse_line_to_row(raw: bytes, field_names: FieldNames, *, is_first: bool = False) -> LineRow:
    """Flatten one line, with or without its line end, into a row; never raises."""
    body = strip_line(raw, is_first=is_first)
    if not body:
        return LineRow(is_blank=True)
    try:
        example = parse_line(body, field_names)
    except LineProblem as problem:
        return LineRow(check=problem.check, message=problem.message)
    return _flatten_example(example, field_names)


def _flatten_example(example: Example, field_names: FieldNames) -> LineRow:
    roles = _letters_of_turns(example)
    content = _text_to_compare(example, roles)
    shown = (
        content
        if example.is_plain
        else "\n".join(collect_strings([example.messages, example.tools]))
    )
    unknown = ", ".join(sorted(example.unknown_keys)) or None
    return LineRow(
        example.format,
        roles,
        content,
        shown,
        _name_first_blank_field(example, field_names),
        unknown,
    )


def _letters_of_turns(example: Example) -> str:
    """One letter a turn; a tool's result whose id no call before it has is an orphan."""
    letters = ""
    ids: set[str] = set()
    for message in example.messages:
        letter = _LETTER_BY_ROLE.get(message["role"], _OTHER_ROLE_LETTER)
        if is_tool_calling_message(message):
            letter = _TOOL_CALL_LETTER
            ids = _tool_call_ids(message["tool_calls"])
        elif letter == "t" and ids and message.get("tool_call_id") not in ids | {None}:
            letter = _ORPHAN_RESULT_LETTER
        letters += letter
    return letters


def _tool_call_ids(calls: list[dict[str, Any]]) -> set[str]:
    return {str(call["id"]) for call in calls if call.get("id") is not None}


def _text_to_compare(example: Example, roles: str) -> str:
    """All that is tokenised as one text; the last NUL in it ends the prompt.

    Fields are joined by NUL, which no sound line contains, so that unequal examples stay unequal.
    """
    if example.format == "text":
        return example.text
    if example.is_plain:
        return "\0".join([roles, *[message["content"] for message in example.messages]])
    before = _as_json([example.tools, example.messages[:-1]])
    return f"{before}\0{_as_json(example.messages[-1:])}"


def _name_first_blank_field(example: Example, field_names: FieldNames) -> str | None:
    """The name of the first field without any text; a system's or a tool's turn may be empty."""
    if example.format == "text":
        return None if example.text.strip() else field_names.text
    for index, message in enumerate(example.messages):
        content = message.get("content")
        if content and not content.isspace():
            continue
        if message["role"] in ("user", "assistant") and not is_tool_calling_message(message):
            if example.format == "completion":
                return (field_names.prompt, field_names.completion)[index]
            return f"{field_names.chat}[{index}].content"
    return None


RANGE_BYTES = 2 * 2**20
LINE_SCHEMA: dict[str, type[pl.DataType]] = {
    "format": pl.Categorical,
    "roles": pl.Categorical,
    "content": pl.UInt64,  # the first 64 bits of its SHA-256: what finds equal rows
    "prompt": pl.UInt64,  # equal for equal prompts
    "answer": pl.UInt64,  # equal for equal answers; plain text is all answer
    "folded": pl.UInt64,  # equal for contents that differ in case and white space only
    "sensitive": pl.UInt32,  # what it may hold, see SENSITIVE_PATTERNS
    "has_control": pl.Boolean,
    "has_replacement": pl.Boolean,
    "has_crlf": pl.Boolean,
    "has_mark": pl.Boolean,  # begins with a byte-order mark
    "is_blank": pl.Boolean,
    "blank_field": pl.Categorical,
    "unknown_keys": pl.Categorical,
    "check": pl.Categorical,
    "message": pl.Categorical,
}
_LOWERCASE_BYTE_TABLE = bytes(range(256)).lower()
_CONTROL_CHARACTER_PATTERN = r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
_REPLACEMENT_CHARACTER = "\ufffd"


@dataclass(frozen=True, eq=False)
class LineRange:
    """What was read of a range of lines.

    frame: a row each line, see LINE_SCHEMA; where n-grams are wanted, with NGRAM_SCHEMA's columns.
    digests: the SHA-256 of each example in it, joined.
    shared: what its texts share with those asked for, see MATCH_SCHEMA; None where none are.
    examples: how many of its examples have n-grams, where some are asked for.
    """

    frame: pl.DataFrame
    digests: bytes
    shared: pl.DataFrame | None = None
    examples: int = 0


def read_line_range(
    path: Path,
    byte_range: ByteRange,
    field_names: FieldNames,
    *,
    has_ngrams: bool = False,
    asked: AskedNgrams | None = None,
) -> LineRange:
    """Read the rows of a range of lines, and what they share with `asked`.

    The row of a line does not depend on the range it is read in. Raises OSError, and DatasetError
    if the file became shorter.
    """
    size = byte_range.end - byte_range.start
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _):
        file.seek(byte_range.start)
        content = file.read(size)
    if len(content) < size:
        raise DatasetError(f"{path} became shorter while it was read. Start again.")
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    is_start = byte_range.start == 0
    rows = _read_rows(lines, field_names, is_start=is_start, may_be_plain=b"\\u0000" not in content)
    digests, keys = _digests_and_keys(rows.pop("content"))
    raw = pl.Series(lines, dtype=pl.Binary)
    shown: list[str | None] = rows.pop("shown")
    text = pl.Series(shown, dtype=pl.String)
    has_mark = np.zeros(len(lines), bool)
    has_mark[:1] = is_start and lines[0].startswith(codecs.BOM_UTF8)
    columns: dict[str, Any] = {
        **rows,
        **keys,
        "sensitive": find_sensitive_pattern_bits(text),
        "has_control": _find_control_characters(raw, text),
        "has_replacement": text.str.contains(_REPLACEMENT_CHARACTER, literal=True).fill_null(
            value=False
        ),
        "has_crlf": raw.bin.ends_with(b"\r"),
        "has_mark": has_mark,
    }
    frame = pl.DataFrame(columns, schema=LINE_SCHEMA)
    if has_ngrams:
        frame = frame.with_columns(**hash_word_ngrams(shown, WordHasher()).to_columns(shown))
    if asked is None:
        return LineRange(frame, digests)
    return LineRange(frame, digests, *asked.find_in(shown, frame["content"]))


def run_line_range_job(request: dict[str, Any]) -> dict[str, Any]:
    """`read_line_range` as a job: writes OUT.rows, .digests and .shared, answers the examples."""
    done = read_line_range(
        Path(request["path"]),
        ByteRange(*request["byte_range"]),
        FieldNames(**request["field_names"]),
        has_ngrams=request["has_ngrams"],
        asked=_read_asked(request["asked"]) if request["asked"] else None,
    )
    done.frame.write_ipc(f"{request['out']}.rows")
    Path(f"{request['out']}.digests").write_bytes(done.digests)
    if done.shared is not None:
        done.shared.write_ipc(f"{request['out']}.shared")
    return {"examples": done.examples}


@lru_cache(maxsize=1)  # its tables serve all ranges that this process reads
def _read_asked(path: str) -> AskedNgrams:
    return AskedNgrams.read(Path(path))


def _read_rows(
    lines: list[bytes], field_names: FieldNames, *, is_start: bool, may_be_plain: bool
) -> dict[str, list[Any]]:
    """The fields of each line's `LineRow`, as columns."""
    columns = {name: [default] * len(lines) for name, default in LineRow._field_defaults.items()}
    plain = [parse_plain_row(raw, field_names) if may_be_plain else None for raw in lines]
    columns["format"] = [row and row[0] for row in plain]
    columns["roles"] = [row and row[1] for row in plain]
    columns["content"] = [row and row[2] for row in plain]
    columns["shown"] = list(columns["content"])
    is_doubtful = pl.Series(columns["content"], dtype=pl.String).str.contains(BLANK_TURN_PATTERN)
    for index in is_doubtful.fill_null(value=True).arg_true().to_list():
        row = parse_line_to_row(lines[index], field_names, is_first=is_start and index == 0)
        for name, value in row._asdict().items():
            columns[name][index] = value
    return columns


def _digests_and_keys(contents: list[str | None]) -> tuple[bytes, dict[str, pl.Series]]:
    """The digests of the examples, joined, and the keys by which rows are compared."""
    encoded = [None if content is None else content.encode() for content in contents]
    digests = b"".join([sha256(content).digest() for content in encoded if content is not None])
    parts = [None if content is None else content.rpartition(b"\0") for content in encoded]
    prompts = [(part[0] or None) if part else None for part in parts]  # plain text has none
    answers = [part[2] if part else None for part in parts]
    is_example = pl.Series(encoded, dtype=pl.Binary).is_not_null()
    content = np.zeros(len(contents), np.uint64)
    content[is_example.to_numpy()] = np.frombuffer(digests, "<u8")[::4]
    keys = {
        "content": pl.Series(content),
        "prompt": _hash_to_keys(prompts),
        "answer": _hash_to_keys(answers),
        "folded": _hash_to_keys(_fold_case_and_space(encoded)),
    }
    return digests, keys


def _fold_case_and_space(encoded: list[bytes | None]) -> list[bytes | None]:
    """The contents in small letters and without white space."""
    return [
        None
        if content is None
        else (content if content.isascii() else _casefold_utf8(content)).translate(
            _LOWERCASE_BYTE_TABLE, WHITE_SPACE
        )
        for content in encoded
    ]


def _casefold_utf8(content: bytes) -> bytes:
    return content.decode().casefold().encode()


def _hash_to_keys(values: list[bytes | None]) -> pl.Series:
    """A 64-bit key for each value, the same in every process; null for None."""
    series = pl.Series(values, dtype=pl.Binary)
    return pl.select(pl.when(series.is_not_null()).then(series.hash(seed=0))).to_series()


def _find_control_characters(raw: pl.Series, text: pl.Series) -> pl.Series:
    """Whether a text holds a control character; most lines cannot, and are not searched."""
    may = (text.str.len_bytes() != text.str.len_chars()) | raw.bin.contains(b"\x7f")
    for escape in (b"\\u", b"\\b", b"\\f"):
        may |= raw.bin.contains(escape)
    has = np.zeros(len(raw), bool)
    where = may.fill_null(value=False).arg_true()
    has[where.to_numpy()] = text.gather(where).str.contains(_CONTROL_CHARACTER_PATTERN).to_numpy()
    return pl.Series(has)
