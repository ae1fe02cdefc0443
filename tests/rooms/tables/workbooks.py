"""Workbooks as Excel writes them, and as nobody should, made of their XML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape
from zipfile import ZIP_DEFLATED, ZipFile

Cell = str | float | bool | None
MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
RELATED = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
HEAD = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>'
STYLES = {"\0": 1, "\2": 2}  # of `styles`: a date, a duration


def column_name(index: int) -> str:
    """A for 0, AA for 26."""
    before = column_name(index // 26 - 1) if index >= 26 else ""
    return before + chr(ord("A") + index % 26)


def date(days: float) -> str:
    """A cell with a day, and a share of it, since 1899-12-30: the XML of its value."""
    return f"\0{days}"


def duration(days: float) -> str:
    """A cell with so many days, shown as hours."""
    return f"\2{days}"


def formula(text: str, cached: str | None) -> str:
    """A cell with a formula and the value that was saved with it."""
    return f"\1{text}\1{'' if cached is None else cached}"


def write_workbook(
    path: Path,
    rows: Sequence[Sequence[Cell]],
    *,
    merged: Sequence[str] = (),
    hidden: Sequence[Sequence[Cell]] | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """A workbook of one sheet, after a hidden one where there are rows for it.

    files: more files of the package, or others in the place of those.
    """
    sheets = [("Export", "visible", rows, merged)]
    if hidden is not None:
        sheets.insert(0, ("Notes", "hidden", hidden, ()))
    numbers = range(1, len(sheets) + 1)
    listed = "".join(
        f'<sheet name="{name}" sheetId="{number}" state="{state}" r:id="rId{number}"/>'
        for number, (name, state, _, _) in zip(numbers, sheets, strict=True)
    )
    kind = f"{RELATED}/worksheet"
    related = "".join(
        f'<Relationship Id="rId{n}" Type="{kind}" Target="worksheets/sheet{n}.xml"/>'
        for n in numbers
    )
    styles = f'<Relationship Id="rId9" Type="{RELATED}/styles" Target="styles.xml"/>'
    package = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types"/>',
        "_rels/.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="rId1" '
        f'Type="{RELATED}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{MAIN}" xmlns:r="{RELATED}"><sheets>{listed}'
        "</sheets></workbook>",
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{PACKAGE}/relationships">'
        f"{related}{styles}</Relationships>",
        "xl/styles.xml": f'<styleSheet xmlns="{MAIN}"><cellXfs count="3"><xf numFmtId="0"/>'
        '<xf numFmtId="22" applyNumberFormat="1"/><xf numFmtId="46"/></cellXfs></styleSheet>',
        **{
            f"xl/worksheets/sheet{number}.xml": sheet_xml(cells or (), joined)
            for number, (_, _, cells, joined) in zip(numbers, sheets, strict=True)
        },
        **(files or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for name, content in package.items():
            archive.writestr(name, content if content.startswith("<?") else HEAD + content)
    return path


def sheet_xml(rows: Sequence[Sequence[Cell]], merged: Sequence[str] = ()) -> str:
    """The XML of a sheet whose first row is row 1."""
    written = "".join(
        f'<row r="{number}">{"".join(map(cell_xml, _references(number, row), row))}</row>'
        for number, row in enumerate(rows, 1)
    )
    joined = "".join(f'<mergeCell ref="{area}"/>' for area in merged)
    joined = f'<mergeCells count="{len(merged)}">{joined}</mergeCells>' if merged else ""
    return f'<worksheet xmlns="{MAIN}"><sheetData>{written}</sheetData>{joined}</worksheet>'


def _references(number: int, row: Sequence[Cell]) -> list[str]:
    return [f"{column_name(index)}{number}" for index in range(len(row))]


def cell_xml(reference: str, value: Cell) -> str:
    """The XML of a cell; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return f'<c r="{reference}" t="b"><v>{int(value)}</v></c>'
    if isinstance(value, int | float):
        return f'<c r="{reference}"><v>{value!r}</v></c>'
    if value.startswith(("\0", "\2")):
        return f'<c r="{reference}" s="{STYLES[value[0]]}"><v>{value[1:]}</v></c>'
    if value.startswith("\1"):
        text, cached = value[1:].split("\1")
        saved = f"<v>{escape(cached)}</v>" if cached else ""
        return f'<c r="{reference}" t="str"><f>{escape(text)}</f>{saved}</c>'
    return (
        f'<c r="{reference}" t="inlineStr"><is><t xml:space="preserve">{escape(value)}</t></is></c>'
    )
