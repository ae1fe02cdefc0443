"""The core, each room and all together are held to their budgets of lines of code."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.check_budgets import count_code_lines, main

SOURCE = '''"""A docstring
of two lines."""

# a comment


def two() -> str:  # a comment behind code
    """A docstring."""
    return """a text
of two lines"""
'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A core of three lines of code and a room of six, with space for two more, one in each."""
    room = tmp_path / "nested_core" / "rooms" / "chat"
    for folder in (room, tmp_path / "flows" / "rooms" / "chat"):
        folder.mkdir(parents=True)
        (folder / "program.py").write_text(SOURCE)
    (tmp_path / "nested_core" / "core.py").write_text(SOURCE)
    (room / "ROOM.toml").write_text("budget = 7\n")
    (room.parent / "CORE.toml").write_text("budget = 4\nbudget_of_all = 11\n")
    return tmp_path


def test_code_is_neither_comments_nor_docstrings_nor_empty_lines() -> None:
    assert count_code_lines(SOURCE) == 3


@pytest.mark.parametrize(
    ("file", "lines", "over"),
    [
        ("nested_core/core.py", 1, ""),
        ("nested_core/core.py", 2, "core"),
        ("flows/rooms/chat/program.py", 1, ""),
        ("flows/rooms/chat/program.py", 2, "chat"),
    ],
)
def test_one_line_over_a_budget_fails_and_says_where(file, lines, over, root, capsys) -> None:
    (root / file).write_text(SOURCE + "x = 1\n" * lines)
    assert main(root) == int(bool(over))
    assert capsys.readouterr().err.startswith(f"Over the budget: {over}." if over else "")


def test_a_room_that_grows_as_its_budget_does_goes_over_the_budget_of_all(root, capsys) -> None:
    room = root / "nested_core" / "rooms" / "chat"
    (room / "program.py").write_text(SOURCE + "x = 1\n" * 3)
    (room / "ROOM.toml").write_text("budget = 9\n")
    assert main(root) == 1
    assert capsys.readouterr().err.startswith("Over the budget: all. ")
    (root / "nested_core" / "core.py").write_text("x = 1\n" * 2)
    (room.parent / "CORE.toml").write_text("budget = 2\nbudget_of_all = 11\n")
    assert main(root) == 0
