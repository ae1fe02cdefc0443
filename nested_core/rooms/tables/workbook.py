"""An Excel workbook (.xlsx) -> lines of JSON, a row of its first visible sheet each.

Every cell is read as the text that a CSV of the sheet would have; of a formula, the value that was
saved with it. It is read in a process with limits, see data_files.py: the reader allocates all
cells between the first and the last one that is filled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from nested_core.data.sources.file_formats import NumberedLine, RestOfFileUnreadable
from nested_core.errors import shorten
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

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
            reason = "not an .xlsx workbook, or one with a password, or damaged"
            raise RestOfFileUnreadable(
                1, f"{reason}: {shorten(error, 100)}; {SAVE_AGAIN}"
            ) from None
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
