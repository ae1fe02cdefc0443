"""README is short and names each command; the tests and pages that documents name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flows.cli import build_parser
from nested_core.seams import is_there, read_rooms

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.name))
def test_every_test_that_a_document_names_is_there(document: Path) -> None:
    """`test_file.py`, `test_file.py::test_name`, and `::test_name` of the file named before.

    A test of a room is named `ROOM/test_file.py`, and looked for where the room is there.
    """
    pattern = r"`(?:(?:(\w+)/)?(test_\w+\.py))?(?:::(\w+))?`"
    file, paths, skipped = "", list[Path](), False
    for room, name, function in re.findall(pattern, document.read_text()):
        if name:
            file, paths, skipped = name, list_test_files(room, name), is_deleted(room)
            folder = f"tests/rooms/{room}" if room else "tests outside of rooms"
            assert paths or skipped, f"{document.name} names {file}, which is not in {folder}"
        if function and not skipped:
            found = any(f"def {function}(" in path.read_text() for path in paths)
            assert found, f"{document.name}: {file} has no {function}"


def list_test_files(room: str, name: str) -> list[Path]:
    """The test files of that name: in the room's folder, or outside all rooms where room is ""."""
    of_rooms = ROOT / "tests" / "rooms"
    if room:
        return list((of_rooms / room).rglob(name))
    paths = (ROOT / "tests").rglob(name)
    return [path for path in paths if not path.is_relative_to(of_rooms)]


def is_deleted(room: str) -> bool:
    """Whether the table of rooms has this room, and its folder is not there."""
    return room in read_rooms() and not is_there(room)


def test_each_line_about_trust_names_its_test() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    table = text.partition("| who, or what |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) > 8
    named = r"`(\w+/)?test_"
    assert [line for line in table if not re.search(named, line.rpartition("|")[0])] == []
    assert list_parts_without_a_test(text) == []
    few = "## What holds\n\nThis:\n\nWe promise.\n\n- Much.\n- More (`test_more.py`).\n"
    assert list_parts_without_a_test(few) == ["We promise.", "- Much."]


def list_parts_without_a_test(text: str) -> list[str]:
    """Paragraphs and bullets of the chapters that promise something, without tables and headings.

    Those alone that name no test, and introduce no list.
    """
    chapters = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    parts = [
        part.strip()
        for chapter in chapters
        if not chapter.startswith(("What is not defended", "Reports"))
        for part in re.split(
            r"\n\n|\n(?=- )", re.sub(r"(?m)^(\||#).*", "", chapter.partition("\n")[2])
        )
    ]
    named = r"`(\w+/)?test_"
    return [part for part in parts if part and part[-1] != ":" and not re.search(named, part)]


def anchors_of(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h)) for h in headings]
    explicit = re.findall(r'<a (?:id|name)="([^"]+)"', document.read_text())
    return {heading.strip().lower().replace(" ", "-") for heading in kept} | set(explicit)


PAGES = [
    *DOCUMENTS,
    *(ROOT / name for name in ("CONTRIBUTING.md", "benchmarks/README.md", "deployments/README.md")),
]


@pytest.mark.parametrize("document", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{document.name} links to {target}"
        if anchor:
            assert anchor in anchors_of(path), f"{document.name} links to {target}"


def test_the_readme_is_short_and_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    prose = re.sub(r"^```.*?^```|<picture>.*?</picture>|^\|.*?$", "", text, flags=re.M | re.S)
    assert len(prose.split()) <= 600
    assert "\nmake demo " in text
    assert "`make test`" in text
    choices = next(action.choices for action in build_parser()._actions if action.dest == "command")
    assert choices is not None
    assert [name for name in choices if f"`{name}" not in text] == []
