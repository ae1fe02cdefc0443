"""An .xlsx read as the CSV of its sheet would be, and hostile ones ended at a limit."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import polars
import pytest

from nested_core.data.data_settings import DataSettings
from nested_core.data.sources.file_formats import NO_TEXT, RestOfFileUnreadable
from nested_core.data.sources.split_files import open_splits
from nested_core.process import cell
from nested_core.rooms.tables.chats import to_text
from nested_core.rooms.tables.data_files import FOREIGN_FORMATS, READER, read_workbook
from tests.rooms.tables.workbooks import MAIN, date, duration, formula, sheet_xml, write_workbook

HEADER = ("Question", "Answer")


def rows_of(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows of a healthy workbook, read in this process."""
    return [(line.number, json.loads(line.line)) for line in read_workbook(path)]


def rows_by_cell(path: Path) -> list[tuple[int, dict[str, str]]]:
    lines, _ = READER.read(path, path.suffix, frozenset())
    return [(line.number, json.loads(line.line)) for line in lines]


def refusal_of(path: Path) -> str:
    with pytest.raises(RestOfFileUnreadable) as refused:
        rows_by_cell(path)
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
        (1234567890123456, False, date(46001), None),
    )
    assert [
        list(row.values()) for _, row in rows_of(write_workbook(tmp_path / "a.xlsx", rows))
    ] == [
        ["3", "0.3", "2025-12-09", "6"],
        ["1e+20", "TRUE", "2025-12-09 12:00:00", ""],
        ["1234567890123456", "FALSE", "2025-12-10", ""],
    ]


def test_durations_are_hours_minutes_and_seconds(tmp_path: Path) -> None:
    days = (26 / 24, 1.5 / 86400, 10 / 86400, 100, 0, -0.5)
    path = write_workbook(tmp_path / "a.xlsx", (HEADER, *((duration(each), "x") for each in days)))
    assert [row["Question"] for _, row in rows_of(path)] == [
        *("26:00:00", "0:00:01.5", "0:00:10", "2400:00:00", "0:00:00", "-12:00:00")
    ]


def test_the_first_visible_sheet_with_rows_is_read(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "a.xlsx", (HEADER, ("q", "a")), hidden=(("x", "y"), (1, 2)))
    assert rows_of(path) == [(2, {"Question": "q", "Answer": "a"})]


def test_a_table_that_begins_elsewhere_has_the_numbers_of_the_sheet(tmp_path: Path) -> None:
    rows = ((), (), (None, "Q", "A"), (None, "q", "a"))
    path = write_workbook(tmp_path / "a.xlsx", rows)
    assert rows_of(path) == [(4, {"Q": "q", "A": "a"})]


@pytest.mark.parametrize(
    ("rows", "files", "said"),
    [
        ((("A", "A"), ("x", "y")), {}, "two columns of the header have one name: A, A"),
        ((), {}, "expected names of columns in a sheet that is not hidden"),
        (
            (),
            {"xl/workbook.xml": "<?xml?><nothing"},
            "not an .xlsx workbook, or one with a password, or damaged",
        ),
    ],
    ids=["one name twice", "no row", "no workbook"],
)
def test_a_workbook_that_cannot_be_used_is_refused(tmp_path, rows, files, said) -> None:
    assert said in refusal_of(write_workbook(tmp_path / "a.xlsx", rows, files=files))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no more", b"\xd0\xcf\x11\xe0" + b"\0" * 600])
def test_what_is_no_workbook_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.xlsx").write_bytes(content)
    assert "not an .xlsx workbook, or one with a password" in refusal_of(tmp_path / "a.xlsx")


FIRST = '<row r="1"><c r="A1"><v>1</v></c></row>'
FAR = [
    f'{FIRST}<row r="1048576"><c r="XFD1048576"><v>1</v></c></row>',
    f"{FIRST}<row r='1048576'><c s='1' r='XFD1048576'><v>1</v></c></row>",
    f'{FIRST}<row r="1048576"><c r="CV1048576"><v>1</v></c></row>',
]


@pytest.mark.parametrize("cells", FAR, ids=["17 thousand million", "the same", "105 million"])
def test_cells_that_lie_far_apart_are_refused(tmp_path: Path, cells: str) -> None:
    sheet = f'<worksheet xmlns="{MAIN}"><sheetData>{cells}</sheetData></worksheet>'
    path = write_workbook(tmp_path / "a.xlsx", (), files={"xl/worksheets/sheet1.xml": sheet})
    refusal = refusal_of(path)
    assert "its reader was ended: it" in refusal
    assert "look for a cell far outside of the table" in refusal


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "BASE_BYTES", 100 * 2**20)


@pytest.mark.usefixtures("small_limit")
def test_a_text_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "a.xlsx", (HEADER, ("a" * 60_000_000, "b")))
    assert path.stat().st_size < 100_000
    assert "its reader was ended: it took more than" in refusal_of(path)


def test_what_no_sheet_needs_is_not_unpacked(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "a.xlsx", (HEADER, ("q", "a")))
    with ZipFile(path, "a", ZIP_DEFLATED) as archive:
        archive.writestr("xl/media/image1.png", b' r="1"' * 10**7)
    assert rows_by_cell(path) == [(2, {"Question": "q", "Answer": "a"})]


@pytest.mark.usefixtures("small_limit")
def test_a_long_text_of_a_small_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    polars.DataFrame({"prompt": ["q"], "completion": ["a" * 60_000_000]}).write_parquet(path)
    assert path.stat().st_size < 20_000
    refusal = refusal_of(path)
    assert "its reader was ended: it took more than" in refusal
    assert "save its rows as JSON lines" in refusal


@pytest.mark.usefixtures("small_limit")
def test_rows_that_share_a_long_text_are_read_fewer_at_once(tmp_path: Path) -> None:
    long = " ".join(map(str, range(12_000)))
    prompts = [f"{n}" for n in range(1_500)] + [f"{n} {long}" for n in range(1_500)]
    path = tmp_path / "a.parquet"
    polars.DataFrame({"prompt": prompts}).write_parquet(path)
    assert path.stat().st_size < 100_000_000 / 16
    assert rows_by_cell(path) == [(n, {"prompt": text}) for n, text in enumerate(prompts, 1)]


def test_files_of_a_split_are_read_by_one_process_each_within_its_own_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_limit: None
) -> None:
    for number in range(6):
        texts = ["a" * 60_000_000 if number == 3 else "a"]
        rows = {"prompt": [f"{number}"], "completion": texts}
        polars.DataFrame(rows).write_parquet(tmp_path / f"{number}.parquet")
    write_workbook(tmp_path / "7.xlsx", (("prompt", "completion"), ("7", "a")))
    started: list[str] = []
    start = cell.Cell.for_file

    def note_and_start(function: str, path: Path, **options: Any) -> cell.Cell:
        started.append(path.name)
        return start(function, path, **options)

    monkeypatch.setattr(cell.Cell, "for_file", note_and_start)
    spool = tmp_path / "spool"
    spool.mkdir()
    split = open_splits(DataSettings(str(tmp_path / "*.*")), spool)["train"]
    lines = split.path.read_bytes().splitlines()
    assert [json.loads(line)["prompt"] for line in lines if line] == [*"012457"]
    ((at, (_, message)),) = split.problems.items()
    assert lines[at - 1] == b""
    assert "its reader was ended: it took more than" in message
    new = len(FOREIGN_FORMATS[".parquet"].rows_at_once)
    assert started == ["0.parquet", *["3.parquet"] * new, "4.parquet"]


def test_numbers_of_a_parquet_are_written_as_they_were(tmp_path: Path) -> None:
    columns = {
        "single": polars.Series([0.1, 1e-8, float("nan")], dtype=polars.Float32),
        "double": polars.Series([0.1, 1e300, None]),
        "decimal": polars.Series(map(Decimal, ("1.10", "0.0000001", "-20"))).cast(
            polars.Decimal(20, 7)
        ),
    }
    polars.DataFrame(columns).write_parquet(tmp_path / "a.parquet")
    rows: list[Any] = [(*row.values(),) for _, row in rows_by_cell(tmp_path / "a.parquet")]
    assert rows == [
        (0.1, 0.1, "1.1000000"),
        (1e-8, 1e300, "0.0000001"),
        (None, None, "-20.0000000"),
    ]


def test_bytes_of_a_parquet_are_its_text_and_nothing_where_they_are_none(tmp_path: Path) -> None:
    """Texts as old writers leave them, without the mark of text."""
    rows = [{"a": "café".encode(), "b": [b"x"]}, {"a": "café".encode("latin-1"), "b": None}]
    rows.append({"a": b"a\x00", "b": [b"\x01\x1b\x7f"]})  # of control characters, NUL is no text
    polars.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    read = [row for _, row in rows_by_cell(tmp_path / "a.parquet")]
    nul = {"a": {NO_TEXT: 2}, "b": ["\x01\x1b\x7f"]}
    assert read == [{"a": "café", "b": ["x"]}, {"a": {NO_TEXT: 4}, "b": None}, nul]
    assert [to_text(row["a"]) for row in read] == ["café", "", ""]  # so that the row is left out


SHORT = polars.Struct({"box": polars.List(polars.Float32), "half": polars.Float16})


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (polars.Float16, [0.1, 0.262, 1e-5, 2.5, 10008.0, None]),
        (polars.List(polars.Float32), [[0.1, None, 1e-8], [], None]),
        (polars.Array(polars.Float16, 2), [[0.1, 0.262], [2.5, None], None]),
        (polars.List(polars.List(polars.Float32)), [[[0.1], [0.262]], [None]]),
        (SHORT, [{"box": [0.1, 0.262], "half": 0.3}, {"box": None, "half": None}, None]),
        (polars.List(SHORT), [[{"box": [0.1], "half": 0.3}], [None], []]),
        (polars.List(polars.Float64), [[0.10000000149011612]]),
    ],
    ids=str,
)
def test_short_numbers_have_no_digits_that_nobody_wrote_however_deep(
    tmp_path: Path, dtype: polars.DataType, values: list[Any]
) -> None:
    polars.DataFrame({"a": polars.Series(values, dtype=dtype)}).write_parquet(
        tmp_path / "a.parquet"
    )
    assert [row["a"] for _, row in rows_by_cell(tmp_path / "a.parquet")] == values


def test_rows_of_many_answers_of_the_reader_are_all_there(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number} {'é' * 100_000}"} for number in range(50)]
    polars.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    assert rows_by_cell(tmp_path / "a.parquet") == list(enumerate(rows, 1))


def test_entities_are_refused_and_no_file_is_read_for_them(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    entity = f'<!DOCTYPE w [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]>'
    sheet = sheet_xml((HEADER, ("&x;", "b"))).replace("&amp;x;", "&x;")
    path = write_workbook(
        tmp_path / "a.xlsx",
        (),
        files={"xl/worksheets/sheet1.xml": f"<?xml version='1.0'?>{entity}{sheet}"},
    )
    assert "not an .xlsx workbook, or one with a password, or damaged" in refusal_of(path)
