"""An .xlsx read as the CSV of its sheet would be, and hostile ones refused before they are read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from nested_core.data.sources.file_formats import RestOfFileUnreadable
from nested_core.rooms.tables import workbook
from nested_core.rooms.tables.workbook import read_workbook
from tests.rooms.tables.workbooks import MAIN, date, formula, sheet_xml, write_workbook

HEADER = ("Question", "Answer")


def rows_of(path: Path) -> list[tuple[int, dict[str, str]]]:
    return [(line.number, json.loads(line.line)) for line in read_workbook(path)]


def refusal_of(path: Path) -> str:
    with pytest.raises(RestOfFileUnreadable) as refused:
        list(read_workbook(path))
    return refused.value.message


def test_titles_above_the_header_and_empty_rows_are_passed_over(tmp_path: Path) -> None:
    rows = (("Support export, November",), (), ("By:", "Ann"), ("Id", "Subject", "Text", "Label"))
    more = ((1, "Lost", "Where?", "shipping"), (), (2, None, "Who?", "account"))
    path = write_workbook(tmp_path / "a.xlsx", (*rows, *more), merged=("A1:D1",))
    assert rows_of(path) == [
        (5, {"Id": "1", "Subject": "Lost", "Text": "Where?", "Label": "shipping"}),
        (7, {"Id": "2", "Subject": "", "Text": "Who?", "Label": "account"}),
    ]


def test_cells_that_are_merged_downwards_have_the_value_of_the_first(tmp_path: Path) -> None:
    rows = (HEADER, ("a", "x"), ("b", None), ("c", None), ("d", None))
    path = write_workbook(tmp_path / "a.xlsx", rows, merged=("B2:B4",))
    assert [row["Answer"] for _, row in rows_of(path)] == ["x", "x", "x", ""]


def test_numbers_dates_and_formulas_are_the_texts_that_the_sheet_shows(tmp_path: Path) -> None:
    rows = (
        (*HEADER, "When", "Sum"),
        (3, 0.1 + 0.2, date(46000), formula("A2*2", "6")),
        (1e20, True, date(46000.5), formula("A3", None)),
    )
    assert [
        list(row.values()) for _, row in rows_of(write_workbook(tmp_path / "a.xlsx", rows))
    ] == [
        ["3", "0.3", "2025-12-09", "6"],
        ["1e+20", "TRUE", "2025-12-09 12:00:00", ""],
    ]


def test_the_first_visible_sheet_with_rows_is_read(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "a.xlsx", (HEADER, ("q", "a")), hidden=(("x", "y"), (1, 2)))
    assert rows_of(path) == [(2, {"Question": "q", "Answer": "a"})]


def test_a_table_that_begins_elsewhere_has_the_numbers_of_the_sheet(tmp_path: Path) -> None:
    rows = ((), (), (None, "Q", "A"), (None, "q", "a"))
    path = write_workbook(tmp_path / "a.xlsx", rows)
    assert rows_of(path) == [(4, {"Q": "q", "A": "a"})]


LARGE = (HEADER, ("a" * 200_000, "b"))


def with_false_sizes(path: Path) -> None:
    """Let the directory of the package give each file 10 bytes."""
    content, start = bytearray(path.read_bytes()), 0
    while (start := content.find(b"PK\x01\x02", start)) >= 0:
        content[start + 24 : start + 28] = struct.pack("<I", 10)
        start += 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("rows", "files", "change", "said"),
    [
        ((("A", "A"), ("x", "y")), {}, None, "two columns of the header have one name: A, A"),
        ((), {}, None, "expected names of columns in a sheet that is not hidden"),
        ((), {"xl/workbook.xml": "<?xml?><nothing"}, None, "the workbook cannot be read"),
        (LARGE, {}, None, "it unpacks to more than 100,000 bytes"),
        (LARGE, {}, with_false_sizes, "not an .xlsx workbook"),
    ],
    ids=["one name twice", "no row", "no workbook", "unpacks to too much", "false sizes"],
)
def test_a_workbook_that_cannot_be_used_is_refused_before_it_is_read(
    tmp_path, monkeypatch, rows, files, change, said
) -> None:
    monkeypatch.setattr(workbook, "MAX_UNPACKED_BYTES", 100_000)
    path = write_workbook(tmp_path / "a.xlsx", rows, files=files)
    assert path.stat().st_size < 10_000
    if change is not None:
        change(path)
    assert said in refusal_of(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no more", b"\xd0\xcf\x11\xe0" + b"\0" * 600])
def test_what_is_no_workbook_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.xlsx").write_bytes(content)
    assert "not an .xlsx workbook, or one with a password" in refusal_of(tmp_path / "a.xlsx")


@pytest.mark.parametrize(
    "cells",
    [
        '<row r="1"><c r="A1"/></row><row r="1048576"><c r="XFD1048576"><v>1</v></c></row>',
        "<row r='1048576'><c s='1' r = 'XFD1048576'><v>1</v></c></row><row r='2'><c r='A2'/></row>",
        '<row r="1048576"><c r="&#88;FD1048576"><v>1</v></c>' + "<c/>" * 20 + "</row>",
        '<row r="1048570"/>' + f"<row>{'<c><v>1</v></c>' * 50}</row>" * 3,
    ],
)
def test_cells_that_lie_far_apart_are_refused(tmp_path: Path, cells: str) -> None:
    sheet = f'<worksheet xmlns="{MAIN}"><sheetData>{cells}</sheetData></worksheet>'
    path = write_workbook(tmp_path / "a.xlsx", (), files={"xl/worksheets/sheet1.xml": sheet})
    assert "its filled cells span" in refusal_of(path)


def test_entities_are_refused_and_no_file_is_read_for_them(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    entity = f'<!DOCTYPE w [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]>'
    sheet = sheet_xml((HEADER, ("&x;", "b"))).replace("&amp;x;", "&x;")
    path = write_workbook(
        tmp_path / "a.xlsx",
        (),
        files={"xl/worksheets/sheet1.xml": f"<?xml version='1.0'?>{entity}{sheet}"},
    )
    assert "XML that no spreadsheet writes" in refusal_of(path)
