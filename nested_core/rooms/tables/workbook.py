"""An Excel workbook (.xlsx) -> lines of JSON, a row of its first visible sheet each.

Every cell is read as the text that a CSV of the sheet would have; of a formula, the value that was
saved with it. The reader allocates all cells between the first and the last one that is filled, and
a failed allocation ends the process: so sizes are looked at before it is given the file.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

from nested_core.data.sources.file_formats import NumberedLine, RestOfFileUnreadable
from nested_core.errors import shorten
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

MAX_UNPACKED_BYTES = 2**30
MAX_CELLS = 20_000_000  # the reader takes 32 bytes for each
HEADER_ROWS = 30  # among which the names of the columns are looked for
HEADER_SHARE = 0.6  # of the most cells that one of these rows fills: a title fills fewer
_ATTRIBUTE_R = re.compile(rb"\sr\s*=\s*[\"']([A-Za-z]{0,3})(\d{1,7})[\"']")
_CELL_TAG = re.compile(rb"<(?:\w+:)?c[\s/>]")
_ROW_TAG = re.compile(rb"<(?:\w+:)?row[\s/>]")
_WIDE_ENCODINGS = (b"\xff\xfe", b"\xfe\xff", b"<\0", b"\0<", b"\0\0")
_SAVE_AGAIN = "open it in a spreadsheet and save the sheet as .xlsx again, or as CSV UTF-8"


def read_workbook(path: Path) -> Iterator[NumberedLine]:
    """Yield the rows below the header that are not empty, each with its number in the sheet.

    The header is the first row that has at least HEADER_SHARE of the filled cells of the widest
    one, so that titles above it are skipped. Of cells that are merged downwards, each gets the
    value of the first. Raises RestOfFileUnreadable for a workbook that cannot be read.
    """
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _size):
        _require_bounded(file)
        rows = _read_rows(file)
    header = _find_header(rows)
    columns = [name or f"column {number}" for number, name in enumerate(rows[header], 1)]
    if len(set(columns)) < len(columns):
        message = f"two columns of the header have one name: {shorten(', '.join(columns), 200)}"
        raise RestOfFileUnreadable(header + 1, message)
    for number, cells in enumerate(rows[header + 1 :], header + 2):
        row = {
            column: cell
            for column, name, cell in zip(columns, rows[header], cells, strict=True)
            if name or cell
        }
        if any(map(str.strip, row.values())):
            yield NumberedLine(number, json.dumps(row, ensure_ascii=False).encode())


def _find_header(rows: Sequence[Sequence[str]]) -> int:
    """Return the index of the row that names the columns."""
    filled = [sum(bool(cell.strip()) for cell in row) for row in rows[:HEADER_ROWS]]
    if not any(filled):
        raise RestOfFileUnreadable(
            1, "expected names of columns in a sheet that is not hidden, found none"
        )
    return next(index for index, count in enumerate(filled) if count >= HEADER_SHARE * max(filled))


def _require_bounded(file: IO[bytes]) -> None:
    """Raise RestOfFileUnreadable if a workbook unpacks to too much, or its cells span too much."""
    bytes_left = MAX_UNPACKED_BYTES
    try:
        with ZipFile(file) as archive:
            for member in archive.infolist():
                with archive.open(member) as unpacked:
                    content = unpacked.read(bytes_left + 1)
                bytes_left -= len(content)
                if bytes_left < 0:
                    limit = f"{MAX_UNPACKED_BYTES:,} bytes"
                    raise RestOfFileUnreadable(1, f"it unpacks to more than {limit}; {_SAVE_AGAIN}")
                _require_plain_member(content)
    except (BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        reason = f"not an .xlsx workbook, or one with a password: {shorten(error, 80)}"
        raise RestOfFileUnreadable(1, f"{reason}; {_SAVE_AGAIN}") from None


def _require_plain_member(content: bytes) -> None:
    """Raise RestOfFileUnreadable for XML that no spreadsheet writes, and cells too far apart."""
    if content.startswith(_WIDE_ENCODINGS) or b"<!DOCTYPE" in content[:1000]:
        message = "it holds XML that no spreadsheet writes: a document type, or no UTF-8"
        raise RestOfFileUnreadable(1, f"{message}; {_SAVE_AGAIN}")
    rows = columns = 1
    placed = 0
    for letters, digits in _ATTRIBUTE_R.findall(content):
        rows = max(rows, int(digits))
        columns = max(columns, _column_number(letters))
        placed += bool(letters)
    if placed < len(_CELL_TAG.findall(content)):  # a cell that says no place follows the last one
        parts = _ROW_TAG.split(content)
        rows += len(parts)
        columns += max(len(_CELL_TAG.findall(part)) for part in parts)
    if rows * columns > MAX_CELLS:
        message = f"its filled cells span {rows:,} rows and {columns:,} columns"
        raise RestOfFileUnreadable(
            1, f"{message}; remove what is far outside of the table, and {_SAVE_AGAIN}"
        )


def _column_number(letters: bytes) -> int:
    """Return the number of a column: 1 for A, 27 for AA; 0 without letters."""
    number = 0
    for letter in letters.upper():
        number = 26 * number + letter - ord("A") + 1
    return number


def _read_rows(file: IO[bytes]) -> list[list[str]]:
    """Return the rows of the first visible sheet that has any, as texts; empty without one."""
    import python_calamine as calamine  # a hundredth of a second that no other format needs

    file.seek(0)
    try:
        with calamine.CalamineWorkbook.from_filelike(file) as workbook:
            for index, metadata in enumerate(workbook.sheets_metadata):
                is_table = metadata.typ == calamine.SheetTypeEnum.WorkSheet
                if is_table and metadata.visible == calamine.SheetVisibleEnum.Visible:
                    sheet = workbook.get_sheet_by_index(index)
                    if sheet.start is not None:
                        return list(_fill_merged_cells(sheet))
    except BaseException as error:
        # A panic of the reader is no Exception.
        if isinstance(error, calamine.CalamineError) or type(error).__name__ == "PanicException":
            reason = f"the workbook cannot be read: {shorten(error, 100)}"
            raise RestOfFileUnreadable(1, f"{reason}; {_SAVE_AGAIN}") from None
        raise
    return []


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
    """Write a cell's text as a spreadsheet does in a CSV; dates and times in ISO 8601."""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return f"{value:.15g}" if abs(value) < 1e15 else repr(value)
    return str(value)
