"""Read CSV tables, parquet, workbooks and arrays of JSON as lines of JSON, each with its number.

A damaged file is read up to the damage, which is reported with its position. A workbook (.xlsx) is
read as the text that a CSV of its first visible sheet would have; of a formula, the value that was
saved with it. That is done in a process with limits: the reader allocates all cells between the
first and the last one that is filled.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from functools import lru_cache
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from nested_core.data.lines.json_decoding import SAVE_AS_UTF8
from nested_core.data.sources.file_formats import (
    MAX_LINE_BYTES,
    UTF16_MARKS,
    NumberedLine,
    RestOfFileUnreadable,
    TableReader,
    is_utf16,
    open_text,
    read_bounded_lines,
    row_to_json_line,
)
from nested_core.errors import CellOutOfMemory, ChildFailed, shorten
from nested_core.process.cell import Allowance, Cell
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular, read_regular

if TYPE_CHECKING:
    import polars as pl
    from polars.datatypes import DataTypeClass

HEADER_ROWS = 30  # among which the names of the columns are looked for
HEADER_SHARE = 0.6  # of the most cells that one of these rows fills: a title fills fewer
SAVE_AGAIN = "open it in a spreadsheet and save the sheet as .xlsx again, or as CSV UTF-8"


def read_workbook(path: Path) -> Iterator[NumberedLine]:
    """Yield the rows below the header that are not empty, each with its number in the sheet.

    The header is the first row that has at least HEADER_SHARE of the filled cells of the widest
    one, so that titles above it are skipped. Of cells that are merged downwards, each gets the
    value of the first. Raises RestOfFileUnreadable for a workbook that cannot be read.
    """
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _size):
        rows = _read_rows(file)
        first_rows = list(islice(rows, HEADER_ROWS))
        header = _find_header(first_rows)
        names = first_rows[header]
        columns = [name or f"column {number}" for number, name in enumerate(names, 1)]
        if len(set(columns)) < len(columns):
            message = f"two columns of the header have one name: {shorten(', '.join(columns), 200)}"
            raise RestOfFileUnreadable(header + 1, message)
        for number, cells in enumerate(chain(first_rows[header + 1 :], rows), header + 2):
            row = {
                column: cell
                for column, name, cell in zip(columns, names, cells, strict=True)
                if name or cell
            }
            if any(map(str.strip, row.values())):
                yield NumberedLine(number, json.dumps(row, ensure_ascii=False).encode())


def _find_header(rows: Sequence[Sequence[str]]) -> int:
    """Return the index of the row that names the columns."""
    filled = [sum(bool(cell.strip()) for cell in row) for row in rows]
    if not any(filled):
        raise RestOfFileUnreadable(
            1, "expected names of columns in a sheet that is not hidden, found none"
        )
    return next(index for index, count in enumerate(filled) if count >= HEADER_SHARE * max(filled))


def _read_rows(file: IO[bytes]) -> Iterator[list[str]]:
    """Yield the rows of the first visible sheet that has any, as texts."""
    import python_calamine as calamine  # a hundredth of a second that no other format needs

    try:
        with calamine.CalamineWorkbook.from_filelike(file) as workbook:
            for index, metadata in enumerate(workbook.sheets_metadata):
                is_table = metadata.typ == calamine.SheetTypeEnum.WorkSheet
                if is_table and metadata.visible == calamine.SheetVisibleEnum.Visible:
                    sheet = workbook.get_sheet_by_index(index)
                    if sheet.start is not None:
                        yield from _fill_merged_cells(sheet)
                        return
    except BaseException as error:
        # A panic of the reader is no Exception.
        if isinstance(error, calamine.CalamineError) or type(error).__name__ == "PanicException":
            why = "not an .xlsx workbook, or one with a password, or damaged"
            raise RestOfFileUnreadable(1, f"{why}: {shorten(error, 100)}; {SAVE_AGAIN}") from None
        raise


def _fill_merged_cells(sheet: Any) -> Iterator[list[str]]:
    """Yield the rows as texts; cells that are merged downwards have the first one's value."""
    first_column = sheet.start[1]
    begins: dict[int, list[tuple[int, int]]] = {}  # by first row: column, last row
    for (first, column), (last, _) in sheet.merged_cell_ranges or ():
        if first_column <= column <= sheet.end[1]:
            begins.setdefault(first, []).append((column - first_column, last))
    merged: dict[int, tuple[int, str]] = {}  # by column: last row, value
    for index, values in enumerate(sheet.iter_rows()):
        cells = list(map(_to_text, values))
        for column, last in begins.get(index, ()):
            merged[column] = last, cells[column]
        for column, (last, value) in merged.items():
            if index <= last and not cells[column]:
                cells[column] = value
        yield cells


def _to_text(value: object) -> str:
    """Write a cell's text as a spreadsheet does in a CSV; dates and times in ISO 8601.

    A duration is hours:minutes:seconds, of any number of hours.
    """
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return f"{value:.15g}" if abs(value) < 1e15 else f"{value:.17g}"
    if isinstance(value, timedelta):
        minutes, seconds = divmod(abs(value).total_seconds(), 60)
        clock = f"{minutes // 60:.0f}:{minutes % 60:02.0f}:{seconds:09.6f}".rstrip("0").rstrip(".")
        return f"-{clock}" if value < timedelta(0) else clock
    return str(value)


# As exported in other countries or from other programs; the comma first, for what fits all alike.
CSV_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_ANSWER_BYTES = 2**20  # of rows that a cell gives at a time
_SNIFFED_BYTES = 2**20  # of a table, in which its delimiter is looked for
_NON_SPACE_PATTERN = re.compile(r"[^ \t\n\r]")
_LINE_ENDS_TO_SPACES = str.maketrans("\n\r", "  ")  # in valid JSON they stand between values only


def read_rows(
    path: Path, suffix: str, json_keys: frozenset[str]
) -> tuple[Iterator[NumberedLine], str | None]:
    """Return the rows of a file, and the name of the delimiter of a text table.

    suffix: how the file's name ends, in lower case; any other than those here is a text table.
    json_keys: columns of a text table whose cells hold JSON.
    """
    if suffix in FOREIGN_FORMATS:
        return _read_in_cell(path, suffix), None
    if suffix == ".json":
        return read_json_array(path), None
    delimiter = find_csv_delimiter(path)
    return read_csv(path, json_keys, delimiter), CSV_DELIMITERS[delimiter]


def read_json_array(path: Path) -> Iterator[NumberedLine]:
    """Yield the elements of a .json file with one array; the whole file is held in memory.

    Raises RestOfFileUnreadable at the first element that is not valid JSON, with its number in the
    array (for bytes that are no text, 1); the elements before it have been yielded.
    """
    raw = read_regular(path, follow_links=True)
    encoding = "UTF-16" if raw.startswith(UTF16_MARKS) else "UTF-8"
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
    # Only where a value ends is asked: its parts are forgotten, which could take much memory
    decoder = json.JSONDecoder(object_hook=_forget, parse_int=_forget, parse_float=_forget)
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
            message = f"expected a comma or ] at {_describe_position(text, position)}"
            raise RestOfFileUnreadable(number + 1, message)
        position = _skip_space(text, position + 1)
    position = _skip_space(text, position + 1)
    if position < len(text):
        message = f"text after the array at {_describe_position(text, position)}"
        raise RestOfFileUnreadable(number + 1, message)


def _forget(part: object) -> None:
    """Return nothing in the place of a part of a value."""


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
    except RecursionError:
        where = _describe_position(text, start)
        raise RestOfFileUnreadable(number, f"the value at {where} is nested too deep") from None


def _describe_position(text: str, position: int) -> str:
    """Describe a position in a text as line and column."""
    line = text.count("\n", 0, position) + 1
    return f"line {line} column {position - text.rfind(chr(10), 0, position)}"


def find_csv_delimiter(path: Path) -> str:
    """Return the delimiter with which most of a table's records have as many cells as its header.

    The first MiB is examined. Of several that fit equally well, the one that gives most cells, of
    these a tab, which texts have least; a comma if none gives the header several. Damage is
    reported later by `read_csv`.
    """
    with _open_table(path) as file:
        lines: list[str] = []
        size = 0
        with suppress(RestOfFileUnreadable):
            for line in read_bounded_lines(file):
                lines.append(line)
                size += len(line)
                if size > _SNIFFED_BYTES:
                    break
    return max(CSV_DELIMITERS, key=lambda delimiter: _count_fitting_records(lines, delimiter))


def _count_fitting_records(lines: list[str], delimiter: str) -> tuple[int, int, bool]:
    """Count the records with as many cells as the first, which must have several, and these cells.

    lines: the first lines of a table.

    The third is whether the delimiter is a tab.
    """
    sizes: list[int] = []
    with suppress(csv.Error):  # such as quotes that do not end where this delimiter ends a cell
        sizes.extend(map(len, csv.reader(lines, delimiter=delimiter, strict=True)))
    if not sizes or sizes[0] < 2:
        return 0, 0, False
    return sizes.count(sizes[0]), sizes[0], delimiter == "\t"


def read_csv(path: Path, json_keys: frozenset[str], delimiter: str) -> Iterator[NumberedLine]:
    """Yield the records of a CSV table as JSON objects; the first record names the columns.

    json_keys: columns whose cells contain JSON.

    Raises RestOfFileUnreadable at a damaged record, such as one with unbalanced quotes.
    """
    with _open_table(path) as file:
        lines = _RecordLines(read_bounded_lines(file))
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
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
            lines.characters = 0


class _RecordLines:
    """The lines of a CSV; RestOfFileUnreadable where those of one record are too long together.

    characters: since the record began; who reads them sets it to 0 then.
    """

    def __init__(self, lines: Iterator[str]) -> None:
        """Take the lines from another iterator."""
        self._lines = enumerate(lines, start=1)
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            self.characters += len(line)
            if self.characters > MAX_LINE_BYTES // 4:
                message = "the record is longer than a line may be: is a quotation mark not closed?"
                raise RestOfFileUnreadable(number, message)
            yield line


def _open_table(path: Path) -> AbstractContextManager[TextIOWrapper]:
    """Open a CSV file as text, in UTF-8 or UTF-16."""
    csv.field_size_limit(MAX_LINE_BYTES)  # of the whole process; its own is less than a document
    if is_utf16(path):
        return open_text(path, "utf-16", newline="")
    return open_text(path, "utf-8-sig", errors="surrogateescape", newline="")


def _read_csv_header(reader: Iterator[list[str]]) -> list[str]:
    """Read the column names; RestOfFileUnreadable if they are missing or not unique."""
    try:
        columns = next(reader, None)
    except csv.Error as error:
        raise RestOfFileUnreadable(1, f"the header is not valid CSV: {error}") from None
    if not columns:
        message = "expected a header with the names of the columns, found nothing"
        raise RestOfFileUnreadable(1, message)
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


def read_parquet(path: Path, rows_at_once: int) -> Iterator[NumberedLine]:
    """Yield the rows of a .parquet as JSON; lists and structs become JSON arrays and objects.

    rows_at_once: how many are held in memory.
    """
    import polars as pl  # takes half a second; no other format needs it

    number = 0
    try:
        frame = pl.scan_parquet(path, glob=False)
        while (rows := frame.slice(number, rows_at_once).collect()).height:
            shorten_numbers = _find_shortener(pl.Struct(rows.schema))
            for column in rows:
                if (as_text := _with_times_as_text(column.dtype)) == column.dtype:
                    continue
                try:
                    column.to_list()
                except (ValueError, OverflowError):  # Python has no value for one, as year 10000
                    rows = rows.with_columns(column.cast(as_text))
            for row in rows.iter_rows(named=True):
                number += 1
                written = row if shorten_numbers is None else shorten_numbers(row)
                yield NumberedLine(number, row_to_json_line(written))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        why = shorten(error, 100) or type(error).__name__
        raise RestOfFileUnreadable(number + 1, f"the parquet file cannot be read: {why}") from None


def _with_times_as_text(dtype: pl.DataType | DataTypeClass) -> pl.DataType | DataTypeClass:
    """Return a polars dtype with texts for its times, at any depth."""
    import polars as pl

    if isinstance(dtype, pl.List | pl.Array):
        return pl.List(_with_times_as_text(dtype.inner))
    if isinstance(dtype, pl.Struct):
        return pl.Struct({one.name: _with_times_as_text(one.dtype) for one in dtype.fields})
    return pl.String if dtype.is_temporal() else dtype


def _find_shortener(dtype: pl.DataType | DataTypeClass) -> Callable[[Any], Any] | None:
    """Return the function that gives numbers of 16 and 32 bits the digits that were written.

    Of a value of a polars dtype, at any depth: the fewest digits that mean the same number, but of
    a whole number all. As 64 bits it would have more, which nobody wrote. None for a dtype without
    such numbers.
    """
    import numpy as np
    import polars as pl

    for short, as_short in ((pl.Float16, np.float16), (pl.Float32, np.float32)):
        if dtype == short:
            return lambda value: (
                value if value is None or value.is_integer() else float(str(as_short(value)))
            )
    if isinstance(dtype, pl.List | pl.Array):
        of_item = _find_shortener(dtype.inner)
        return of_item and (lambda items: None if items is None else [*map(of_item, items)])
    if isinstance(dtype, pl.Struct):
        of_field = {f.name: of for f in dtype.fields if (of := _find_shortener(f.dtype))}
        if of_field:
            return lambda row: row and row | {name: of(row[name]) for name, of in of_field.items()}
    return None


class ForeignFormat(NamedTuple):
    """A format whose reader is others' code, and so works in a process with limits.

    read: yields the rows of a file, of which it holds as many at once as it is told.
    bytes_per_byte: memory that it may take for each byte of the file.
    rows_at_once: how many it holds; the following where these are too large for the memory.
    advice: what to do with a file that takes more.
    """

    read: Callable[[Path, int], Iterator[NumberedLine]]
    bytes_per_byte: int
    rows_at_once: Sequence[int]
    advice: str


FAR_CELL = "look for a cell far outside of the table, or a text in very many"
FOREIGN_FORMATS = {
    ".parquet": ForeignFormat(
        read_parquet, 16, (10_000, 1_000, 100, 10), "save its rows as JSON lines"
    ),
    ".xlsx": ForeignFormat(  # 3 bytes a cell
        lambda path, _: read_workbook(path), 64, (0,), f"{FAR_CELL}, and {SAVE_AGAIN}"
    ),
}


class _Reader(NamedTuple):
    """A process that reads files.

    seconds: of processor time that its kernel allows.
    has_read: whether it has read another file, which counts to its limits.
    """

    cell: Cell
    seconds: float
    has_read: bool


_spares: ContextVar[list[_Reader] | None] = ContextVar("spares", default=None)


@contextmanager
def sharing_process() -> Iterator[None]:
    """Let files that are read in the block, one after another, share a process.

    To start one takes half a second.
    """
    spares: list[_Reader] = []
    token = _spares.set(spares)
    try:
        yield
    finally:
        _spares.reset(token)
        for reader in spares:
            reader.cell.end()


def _take_reader(path: Path, form: ForeignFormat) -> _Reader:
    """Return a process that is ready for another file and may take no more, or a new one."""
    allowance = Allowance.for_file(path, form.bytes_per_byte)
    spares = _spares.get()
    if spares and spares[-1].seconds <= allowance.seconds:
        reader = spares.pop()
        reader.cell.allowance = allowance
        return reader._replace(has_read=True)
    cell = Cell.for_file(f"{__name__}:give_next_lines", path, bytes_per_byte=form.bytes_per_byte)
    return _Reader(cell, allowance.seconds, has_read=False)


def _read_in_cell(path: Path, suffix: str) -> Iterator[NumberedLine]:
    """Yield the rows of a file, read by a process with limits; RestOfFileUnreadable beyond them.

    A process that has read other files is tried before a new one. Where so many rows at once take
    too much memory, fewer are read.
    """
    form = FOREIGN_FORMATS[suffix]
    sizes, number, is_read = [*form.rows_at_once], 0, False
    while not is_read:
        reader = _take_reader(path, form)
        request = [str(path), suffix, number, sizes[0]]
        try:
            while not is_read:
                lines, damage = reader.cell.ask(request)
                for number, line in lines:
                    yield NumberedLine(number, line.encode())
                if damage is not None:
                    raise RestOfFileUnreadable(*damage)
                is_read = not lines
        except ChildFailed as error:
            if not reader.has_read:
                sizes = sizes[1:] if isinstance(error, CellOutOfMemory) else []
            if not sizes:
                message = f"its reader was ended: {error}; {form.advice}"
                raise RestOfFileUnreadable(number + 1, message) from None
        finally:
            spares = _spares.get()
            if is_read and spares is not None:
                spares.append(reader)
            else:
                reader.cell.end()


def give_next_lines(request: tuple[str, str, int, int]) -> tuple[list[tuple[int, str]], object]:
    """Answer, in a cell, with the next rows of a file, of a MiB or a little more.

    request: the path, its suffix, the number after which rows are given, and how many are read at
        once; the same each time.

    Returns the numbers and lines of rows, none at the end, and what a RestOfFileUnreadable said.
    """
    lines: list[tuple[int, str]] = []
    size = 0
    try:
        for number, line, _ in _open(*request):
            lines.append((number, line.decode()))
            size += len(line)
            if size > _ANSWER_BYTES:
                break
    except RestOfFileUnreadable as error:
        return lines, (error.number, error.message)
    if not lines:
        _open.cache_clear()
    return lines, None


@lru_cache(maxsize=1)
def _open(path: str, suffix: str, after: int, rows_at_once: int) -> Iterator[NumberedLine]:
    """Return the rows of a file, of which each call gives those that are left."""
    rows = FOREIGN_FORMATS[suffix].read(Path(path), rows_at_once)
    return (row for row in rows if row.number > after)


READER = TableReader(read_rows, sharing_process)
