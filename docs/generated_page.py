"""What the programs that make a page from the code do with it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_or_check(page: Path, content: str, arguments: list[str]) -> str | None:
    """Write a page, or with --check only look whether it is current; return what is wrong."""
    if arguments == ["--check"]:
        is_current = page.is_file() and page.read_text(encoding="utf-8") == content
        name = page.relative_to(ROOT).as_posix()
        return None if is_current else f"{name} is out of date: run `make docs`"
    page.write_text(content, encoding="utf-8")
    return None
