"""Read packed, UTF-16 and oversized JSONL as lines of JSON, each with a number to find it by.

A damaged file is read up to the damage, which is reported with its position. Whether a line is a
valid example is decided later.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import IO, AnyStr, NamedTuple, cast

from nested_core.data.lines.json_decoding import SAVE_AS_UTF8
from nested_core.errors import shorten
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

# What may come out of a file, by its size: text of real data sets packs to a tenth, hardly ever to
# a hundredth, and a line of it to more than a few bytes.
MAX_EXPANSION_FACTOR = 200
MIN_PACKED_BYTES_PER_LINE = 4
_TIMES_ITS_SIZE = f"than {MAX_EXPANSION_FACTOR} times its size"
_BYTES_ALWAYS_ALLOWED = 64 * 2**20
_LINES_ALWAYS_ALLOWED = 100_000
MAX_LINE_BYTES = 64 * 2**20
_CHUNK_BYTES = 64 * 2**10
NO_TEXT = "bytes that are no text"  # the one key of what stands for them in a row
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as spreadsheets write "Unicode text"


class NumberedLine(NamedTuple):
    """One line of JSON with its number; for an invalid line it is empty, with check and message."""

    number: int
    line: bytes
    problem: tuple[str, str] | None = None


@dataclass(frozen=True)
class TableReader:
    """The room's reader of data files that are not JSON lines.

    read: returns the rows of a file as lines of JSON, whose reading raises RestOfFileUnreadable,
        and what separates the cells of a text table, such as commas. Of the path, its suffix in
        lower case, and the columns whose cells hold JSON.
    sharing_process: a context in which files that are read one after another share a process.
    """

    read: Callable[[Path, str, frozenset[str]], tuple[Iterator[NumberedLine], str | None]]
    sharing_process: Callable[[], AbstractContextManager[None]]


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
    bytes_left = _bytes_allowed(file_size)
    lines_left = _LINES_ALWAYS_ALLOWED + file_size // MIN_PACKED_BYTES_PER_LINE
    for count, line in enumerate(lines, start=1):
        bytes_left -= len(line.line) + 1
        if bytes_left < 0:
            raise _too_much(line.number)
        if is_packed and count > lines_left:
            limit = f"lines than one for {MIN_PACKED_BYTES_PER_LINE} of its bytes"
            raise _too_much(line.number, limit)
        yield line


def _bytes_allowed(file_size: int) -> int:
    """Return how many bytes may come out of a file of so many."""
    return _BYTES_ALWAYS_ALLOWED + MAX_EXPANSION_FACTOR * file_size


def _too_much(number: int, limit: str = _TIMES_ITS_SIZE) -> RestOfFileUnreadable:
    """Return the error for a packed file that unpacks to more than it may, at this line."""
    message = f"it unpacks to more {limit}; if that is meant, unpack it yourself"
    return RestOfFileUnreadable(number, message)


def is_utf16(path: Path) -> bool:
    """Return whether a file's content, unpacked, begins with the byte-order mark of UTF-16."""
    with suppress(EOFError, gzip.BadGzipFile, zlib.error), _open_bytes(path) as file:
        return file.read(2) in UTF16_MARKS
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


def read_bounded_lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """Yield the lines of a file; RestOfFileUnreadable at one that is too long or damaged.

    A character of a text counts as four bytes, which it may take. All lines together may be as
    large as `limit_expansion` allows, with those of which no row comes.
    """
    most = MAX_LINE_BYTES // (4 if hasattr(file, "encoding") else 1)
    left = _bytes_allowed(os.fstat(file.fileno()).st_size)
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(most + 1)
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
        if len(line) > most:
            counted = ", with four for each character" if most < MAX_LINE_BYTES else ""
            raise RestOfFileUnreadable(number, f"{_too_long_line_message()}{counted}")
        left -= len(line)
        if left < 0:
            raise _too_much(number)
        yield line


def read_gzip_jsonl(path: Path) -> Iterator[NumberedLine]:
    """Yield the lines of a .jsonl.gz."""
    with _open_bytes(path) as file:
        for number, line in enumerate(read_bounded_lines(file), start=1):
            yield NumberedLine(number, line.removesuffix(b"\n"))


def read_utf16_jsonl(path: Path) -> Iterator[NumberedLine]:
    """Yield the lines of a .jsonl or .jsonl.gz in UTF-16, converted to UTF-8."""
    with open_text(path, "utf-16", newline="\n") as file:
        for number, line in enumerate(read_bounded_lines(file), start=1):
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


def _last_line_end(file: IO[bytes], begin: int, end: int) -> int | None:
    """Return the position of the last line end in a range of bytes; None without one.

    file: an open binary file. begin, end: the range of bytes to search.
    """
    while end > begin:
        first = max(begin, end - _CHUNK_BYTES)
        file.seek(first)
        place = file.read(end - first).rfind(b"\n")
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


@contextmanager
def open_text(
    path: Path, encoding: str, newline: str, errors: str = "strict"
) -> Iterator[TextIOWrapper]:
    """Open a file as text, unpacked if its name ends in .gz.

    encoding, newline, errors: as in the built-in `open`.
    """
    with _open_bytes(path) as raw, TextIOWrapper(raw, encoding, errors, newline) as file:
        yield file


def row_to_json_line(row: dict[str, object]) -> bytes:
    """Convert a table row to a JSON line.

    A value unknown to JSON, such as a time, becomes its text, and bytes do where they are UTF-8
    without NUL, which no row may have.

    Other bytes become NO_TEXT with their number; NaN, with which tables mark missing values, and
    infinity become null.
    """
    try:
        return _as_json(row).encode()
    except ValueError:
        return _as_json(finite_or_none(row)).encode()


def _to_json_value(value: object) -> object:
    """Convert a value that JSON does not know to its text; bytes that are none to an object."""
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            if "\0" not in (text := value.decode()):
                return text
        return {NO_TEXT: len(value)}
    return f"{value:f}" if isinstance(value, Decimal) else str(value)  # 0.0000001, and not 1E-7


_as_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_to_json_value).encode


def _too_long_line_message() -> str:
    """Return the message for a line of more than MAX_LINE_BYTES."""
    return f"the line is longer than {MAX_LINE_BYTES:,} bytes"
