"""Lines of code of core and rooms against their budgets: `python docs/check_budgets.py`.

A line of code has a token that is no comment and no docstring. The budgets of the core and of all
together stand in nested_core/rooms/CORE.toml, a room's in its ROOM.toml. Whoever needs more raises
the number there, lowers another by as much in the same commit, and says for whom: the budget of all
does not rise.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = "nested_core/rooms"
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def count_code_lines(source: str) -> int:
    """The lines of a Python file that hold code."""
    lines = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(lines)


def count_folder(folder: Path) -> int:
    """The lines of code of all Python files below a folder; 0 where there is none."""
    return sum(count_code_lines(path.read_text("utf-8")) for path in folder.rglob("*.py"))


def list_budgets(root: Path) -> Iterator[tuple[str, int, int]]:
    """All together, the core, then each room: name, lines of code, budget."""
    rooms = sorted(path.parent for path in (root / ROOMS).glob("*/ROOM.toml"))
    sizes = {
        room.name: count_folder(room) + count_folder(root / "flows" / "rooms" / room.name)
        for room in rooms
    }
    whole = sum(count_folder(root / folder) for folder in ("nested_core", "flows", "tasks"))
    core = tomllib.loads((root / ROOMS / "CORE.toml").read_text("utf-8"))
    yield "all", whole, core["budget_of_all"]
    yield "core", whole - sum(sizes.values()), core["budget"]
    for room in rooms:
        budget = tomllib.loads((room / "ROOM.toml").read_text("utf-8"))["budget"]
        yield room.name, sizes[room.name], budget


def main(root: Path = ROOT) -> int:
    """Print a line for each; 1 where one is over its budget."""
    over = []
    for name, lines, budget in list_budgets(root):
        print(f"{name}: {lines:,} of {budget:,} lines of code")
        if lines > budget:
            over.append(name)
    if over:
        print(
            f"Over the budget: {', '.join(over)}. Take out what is not needed, or raise the number "
            f"in {ROOMS}/CORE.toml or the room's ROOM.toml, lower another by as much, and say for "
            f"whom.",
            file=sys.stderr,
        )
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
