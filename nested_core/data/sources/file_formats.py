"""Read files that are not JSONL as lines of JSON, each with a number to find it by.

A damaged file is read up to the damage, which is reported with its position. Whether a line is a
valid example is decided later.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import IO, Any, AnyStr, NamedTuple, cast

from nested_core.data.lines.json_decoding import SAVE_AS_UTF8
from nested_core.errors import shorten
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular, read_regular

# What may come out of a file, by its size: text of real data sets packs to a tenth, hardly ever to
# a hundredth, and a line of it to more than a few bytes.
MAX_EXPANSION_FACTOR = 200
MIN_PACKED_BYTES_PER_LINE = 4
_BYTES_ALWAYS_ALLOWED = 64 * 2**20
_LINES_ALWAYS_ALLOWED = 100_000
MAX_LINE_BYTES = 64 * 2**20
_CHUNK_BYTES = 64 * 2**10
_PARQUET_ROWS_AT_ONCE = 10_000  # converted at a time
# As exported in other countries or from other programs; the comma first, for what fits all alike.
CSV_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SNIFFED_BYTES = 2**20  # of a table, in which its delimiter is looked for
_NON_SPACE_PATTERN = re.compile(r"[^ \t\n\r]")
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as spreadsheets write "Unicode text"
_LINE_ENDS_TO_SPACES = str.maketrans("\n\r", "  ")  # in valid JSON they stand between values only


class NumberedLine(NamedTuple):
    """One line of JSON with its number; for an invalid line it is empty, with check and message."""

    number: int
    line: bytes
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class RowReader:
    """A room's reader of data files.

    suffix: how the names of such files end, such as ".xlsx"; the files are compressed.
    read: yields the rows of a file as lines of JSON; raises RestOfFileUnreadable.
    """

    suffix: str
    read: Callable[[Path], Iterator[NumberedLine]]


class RestOfFileUnreadable(Exception):
    """A file that cannot be read further: from which number on, and why."""

    def __init__(self, number: int, message: str) -> None:
        """Create the error from the first number that cannot be read, and the reason."""
        super().__init__(message)
        self.number = number
        self.message = message


def limit_expansion(
    lines: Iterable[NumberedLine], file_size: int, *, is_packed: bool
) -> Iterator[NumberedLine]:
    """Yield the lines of a file; RestOfFileUnreadable if they are far larger than the file.

    So a small compressed file cannot fill the disk.

    file_size: in bytes.
    is_packed: whether the file is compressed. A text that is not packed cannot have too many lines,
        but a table's header may make each of them too long.
    """
    bytes_left = _BYTES_ALWAYS_ALLOWED + MAX_EXPANSION_FACTOR * file_size
    lines_left = _LINES_ALWAYS_ALLOWED + file_size // MIN_PACKED_BYTES_PER_LINE
    for count, line in enumerate(lines, start=1):
        bytes_left -= len(line.line) + 1
        limit = f"than {MAX_EXPANSION_FACTOR} times its size"
        # Too many bytes (the limit above), too many lines, or neither
        if is_packed and count > lines_left and bytes_left >= 0:
            limit = f"lines than one for {MIN_PACKED_BYTES_PER_LINE} of its bytes"
        elif bytes_left >= 0:
            yield line
            continue
        message = f"it unpacks to more {limit}; if that is meant, unpack it yourself"
        raise RestOfFileUnreadable(line.number, message)


def is_utf16(path: Path) -> bool:
    """Return whether a file's content, unpacked, begins with the byte-order mark of UTF-16."""
    with suppress(EOFError, gzip.BadGzipFile, zlib.error), _open_bytes(path) as file:
        return file.read(2) in _UTF16_MARKS
    return False


@contextmanager
def _open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file's content, unpacked if its name ends in .gz."""
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _size):
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield cast(IO[bytes], unpacked)
        else:
            yield file


def _read_bounded_lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """Yield the lines of a file; RestOfFileUnreadable at one that is too long or damaged."""
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(MAX_LINE_BYTES + 1)
        except EOFError:
            raise RestOfFileUnreadable(number, "the gzip file is cut off in this line") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            message = f"the gzip file is damaged: {shorten(error, 80)}"
            raise RestOfFileUnreadable(number, message) from None
        except UnicodeDecodeError as error:
            message = f"the file begins as UTF-16 does, and is none from here on: {error.reason}"
            raise RestOfFileUnreadable(number, f"{message}. {SAVE_AS_UTF8}") from None
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise RestOfFileUnreadable(number, _too_long_line_message())
        yield line


def read_gzip_jsonl(path: Path) -> Iterator[NumberedLine]:
    """Yield the lines of a .jsonl.gz."""
    with _open_bytes(path) as file:
        for number, line in enumerate(_read_bounded_lines(file), start=1):
            yield NumberedLine(number, line.removesuffix(b"\n"))


def read_utf16_jsonl(path: Path) -> Iterator[NumberedLine]:
    """Yield the lines of a .jsonl or .jsonl.gz in UTF-16, converted to UTF-8."""
    with _open_text(path, "utf-16", newline="\n") as file:
        for number, line in enumerate(_read_bounded_lines(file), start=1):
            yield NumberedLine(number, line.removesuffix("\n").encode())


def find_start_of_too_long_line(path: Path) -> int | None:
    """Return the byte where the first line of more than MAX_LINE_BYTES begins; None without one.

    From the start of a line, the last line end within MAX_LINE_BYTES is searched backwards; all
    lines before it are short enough, so mostly one small piece is read. A hole of a sparse file
    counts as a too long line.
    """
    start = 0
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, size):
        while start + MAX_LINE_BYTES < size:
            end = _last_line_end(file, start, start + MAX_LINE_BYTES + 1)
            if end is None:
                return start
            start = end + 1
    return None


def _last_line_end(file: Any, begin: int, end: int) -> int | None:
    """Return the position of the last line end in a range of bytes; None without one.

    file: an open binary file. begin, end: the range of bytes to search.
    """
    while end > begin:
        first = max(begin, end - _CHUNK_BYTES)
        file.seek(first)
        place: int = file.read(end - first).rfind(b"\n")
        if place >= 0:
            return first + place
        end = first
    return None


def read_lines_before(path: Path, end: int) -> Iterator[NumberedLine]:
    """Yield the lines of a .jsonl up to the byte where a too long line begins.

    At the end RestOfFileUnreadable is raised for that line.
    """
    number = 1
    with open_regular(path, UNBOUNDED, follow_links=True) as (raw, _), BufferedReader(raw) as file:
        while file.tell() < end:
            yield NumberedLine(number, file.readline().removesuffix(b"\n"))
            number += 1
    raise RestOfFileUnreadable(number, _too_long_line_message())


def read_json_array(path: Path) -> Iterator[NumberedLine]:
    """Yield the elements of a .json file with one array; the whole file is held in memory.

    Raises RestOfFileUnreadable at the first element that is not valid JSON, with its number in the
    array (for bytes that are no text, 1); the elements before it have been yielded.
    """
    raw = read_regular(path, follow_links=True)
    encoding = "UTF-16" if raw.startswith(_UTF16_MARKS) else "UTF-8"
    try:
        text = raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{raw[error.start]:02x} in line {line}"
        raise RestOfFileUnreadable(1, f"{byte} is not {encoding}. {SAVE_AS_UTF8}") from None
    del raw  # frees its memory: the text is as large
    position = _skip_space(text, 0)
    if not text.startswith("[", position):
        first = repr(text[position]) if position < len(text) else "nothing"
        reason = f"expected an array of objects, [{{...}}, ...], found {first}"
        raise RestOfFileUnreadable(1, f"{reason}; name a file with an object a line .jsonl")
    decoder = json.JSONDecoder()
    number = 0
    position = _skip_space(text, position + 1)
    # An array may end at once, but not after a comma; the loop leaves at the ] after an element
    while number or not text.startswith("]", position):
        number += 1
        start, position = position, _find_element_end(decoder, text, position, number)
        # Line ends, which JSON has only between values, would break a line of JSON lines
        yield NumberedLine(number, text[start:position].translate(_LINE_ENDS_TO_SPACES).encode())
        position = _skip_space(text, position)
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            raise RestOfFileUnreadable(
                number + 1, f"expected a comma or ] at {_describe_position(text, position)}"
            )
        position = _skip_space(text, position + 1)
    position = _skip_space(text, position + 1)
    if position < len(text):
        raise RestOfFileUnreadable(
            number + 1, f"text after the array at {_describe_position(text, position)}"
        )


def _skip_space(text: str, position: int) -> int:
    """Return the position of the next character that is no JSON white space."""
    match = _NON_SPACE_PATTERN.search(text, position)
    return match.start() if match else len(text)


def _find_element_end(decoder: json.JSONDecoder, text: str, start: int, number: int) -> int:
    """Return the position after an array's element.

    start: the position of the element in `text`. number: its number in the array, for the message.

    Raises RestOfFileUnreadable if it is not valid JSON.
    """
    try:
        return decoder.raw_decode(text, start)[1]
    except json.JSONDecodeError as error:
        if text.startswith("]", start):
            message = f"a comma before the closing ] at {_describe_position(text, start)}"
            raise RestOfFileUnreadable(number, message) from None
        where = _describe_position(text, min(error.pos, len(text)))
        raise RestOfFileUnreadable(number, f"not valid JSON at {where}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        where = _describe_position(text, start)
        reason = "nested too deep" if isinstance(error, RecursionError) else "a number too long"
        raise RestOfFileUnreadable(number, f"the value at {where} is {reason}") from None


def _describe_position(text: str, position: int) -> str:
    """Describe a position in a text as line and column."""
    line = text.count("\n", 0, position) + 1
    return f"line {line} column {position - text.rfind(chr(10), 0, position)}"


def find_csv_delimiter(path: Path) -> str:
    """Return the delimiter with which most of a table's records have as many cells as its header.

    The first MiB is examined. Of several that fit equally well, the one that gives most cells; a
    comma if none gives the header several. Damage is reported later by `read_csv`.
    """
    with _open_table(path) as file:
        lines: list[str] = []
        size = 0
        with suppress(RestOfFileUnreadable):
            for line in _read_bounded_lines(file):
                lines.append(line)
                size += len(line)
                if size > _SNIFFED_BYTES:
                    break
    return max(CSV_DELIMITERS, key=lambda delimiter: _count_fitting_records(lines, delimiter))


def _count_fitting_records(lines: list[str], delimiter: str) -> tuple[int, int]:
    """Count the records with as many cells as the first, which must have several, and these cells.

    lines: the first lines of a table.
    """
    sizes: list[int] = []
    with suppress(csv.Error):  # such as quotes that do not end where this delimiter ends a cell
        sizes.extend(map(len, csv.reader(lines, delimiter=delimiter, strict=True)))
    return (sizes.count(sizes[0]), sizes[0]) if sizes and sizes[0] > 1 else (0, 0)


def read_csv(path: Path, json_keys: frozenset[str], delimiter: str) -> Iterator[NumberedLine]:
    """Yield the records of a CSV table as JSON objects; the first record names the columns.

    json_keys: columns whose cells contain JSON.

    Raises RestOfFileUnreadable at a damaged record, such as one with unbalanced quotes.
    """
    with _open_table(path) as file:
        reader = csv.reader(_read_bounded_lines(file), delimiter=delimiter, strict=True)
        columns = _read_csv_header(reader)
        line = reader.line_num + 1  # where the next record begins; one may have several lines
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                where = f"in lines {line} to {reader.line_num}" if reader.line_num > line else ""
                raise RestOfFileUnreadable(
                    line, f"not valid CSV {where or 'in this line'}: {error}"
                ) from None
            if cells is None:
                return
            yield NumberedLine(line, *_csv_cells_to_json_line(columns, cells, json_keys))
            line = reader.line_num + 1


@contextmanager
def _open_text(
    path: Path, encoding: str, newline: str, errors: str = "strict"
) -> Iterator[TextIOWrapper]:
    """Open a file as text, unpacked if its name ends in .gz.

    encoding, newline, errors: as in the built-in `open`.
    """
    with _open_bytes(path) as raw, TextIOWrapper(raw, encoding, errors, newline) as file:
        yield file


def _open_table(path: Path) -> AbstractContextManager[TextIOWrapper]:
    """Open a CSV file as text, in UTF-8 or UTF-16."""
    csv.field_size_limit(MAX_LINE_BYTES)  # of the whole process; its own is less than a document
    if is_utf16(path):
        return _open_text(path, "utf-16", newline="")
    return _open_text(path, "utf-8-sig", errors="surrogateescape", newline="")


def _read_csv_header(reader: Iterator[list[str]]) -> list[str]:
    """Read the column names; RestOfFileUnreadable if they are missing or not unique."""
    try:
        columns = next(reader, None)
    except csv.Error as error:
        raise RestOfFileUnreadable(1, f"the header is not valid CSV: {error}") from None
    if not columns:
        raise RestOfFileUnreadable(
            1, "expected a header with the names of the columns, found nothing"
        )
    named = [column for column in columns if column]
    if len(set(named)) < len(named):
        raise RestOfFileUnreadable(
            1, f"two columns of the header have one name: {shorten(', '.join(columns))}"
        )
    return columns


def _csv_cells_to_json_line(
    columns: list[str], cells: list[str], json_keys: frozenset[str]
) -> tuple[bytes, tuple[str, str] | None]:
    """Convert a table's record to a JSON line; return it and what is wrong with the record.

    columns: the names of the columns. json_keys: the columns whose cells contain JSON, which is
        taken as it is; an empty cell there leaves the key out.

    Returns the line and None; for an invalid record an empty line, and the name of the check with a
    message.
    """
    if not cells or (len(cells) > 1 and not any(map(str.strip, cells))):
        return b"", None  # as spreadsheets write rows that are empty
    if len(cells) != len(columns):
        message = f"expected {len(columns)} cells as in the header, found {len(cells)}"
        return b"", ("cell-count", message)
    fields = []
    for column, cell in zip(columns, cells, strict=True):
        if not column and not cell.strip():
            continue  # what a delimiter at the end of each line makes
        value = json.dumps(cell, ensure_ascii=False)
        if column in json_keys:
            if not cell.strip():
                continue
            try:
                json.loads(cell)
            except (ValueError, RecursionError) as error:
                return b"", ("bad-json", f"the cell {column} is not valid JSON: {error}")
            value = cell.translate(_LINE_ENDS_TO_SPACES)
        fields.append(f"{json.dumps(column, ensure_ascii=False)}: {value}")
    try:
        return f"{{{', '.join(fields)}}}".encode(), None
    except UnicodeEncodeError:
        return b"", ("not-utf8", f"a byte is not UTF-8. {SAVE_AS_UTF8}")


def read_parquet(path: Path) -> Iterator[NumberedLine]:
    """Yield the rows of a .parquet as JSON; lists and structs become JSON arrays and objects."""
    import polars as pl  # takes half a second; no other format needs it

    number = 0
    try:
        frame = pl.scan_parquet(path, glob=False)
        while (rows := frame.slice(number, _PARQUET_ROWS_AT_ONCE).collect()).height:
            for row in rows.iter_rows(named=True):
                number += 1
                yield NumberedLine(number, row_to_json_line(row))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = shorten(error, 100) or type(error).__name__
        raise RestOfFileUnreadable(
            number + 1, f"the parquet file cannot be read: {reason}"
        ) from None


def row_to_json_line(row: dict[str, Any]) -> bytes:
    """Convert a table row to a JSON line.

    A value unknown to JSON, such as a time, becomes its text.

    Bytes become an object, since they are no text; NaN, with which tables mark missing values, and
    infinity become null.
    """
    try:
        return _as_json(row).encode()
    except ValueError:
        return _as_json(finite_or_none(row)).encode()


def _to_json_value(value: object) -> object:
    """Convert a value that JSON does not know to an object (bytes) or its text."""
    return {"bytes": len(value)} if isinstance(value, bytes) else str(value)


_as_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_to_json_value).encode


def _too_long_line_message() -> str:
    """Return the message for a line of more than MAX_LINE_BYTES."""
    return f"the line is longer than {MAX_LINE_BYTES:,} bytes"
