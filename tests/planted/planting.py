"""Faults that are planted one at a time in a copy of the tree, and probes where they would be."""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass
from pathlib import Path

PROBE = "__import__('tests.planted.probe', fromlist=['reach']).reach"


@dataclass(frozen=True)
class Fault:
    """A change that a test should fail on.

    path: the file, from the root of the tree. Its first folders name the room that it is in.
    old, new: what is replaced, which is there once, and by what.
    kind: what sort of mistake it is.
    """

    path: str
    old: str
    new: str
    kind: str

    @property
    def room(self) -> str:
        """`tasks`, `flows`, or a package of nested_core."""
        parts = Path(self.path).parts
        return parts[0] if parts[0] != "nested_core" else Path(parts[1]).stem


class Misplaced(Exception):
    """A fault whose text is not in its file exactly once, or which leaves no program."""


def plant(fault: Fault, root: Path) -> str:
    """Change the file; returns its content as it was."""
    path = root / fault.path
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before.count(fault.old) != 1:
        raise Misplaced(f"{fault.path} holds {before.count(fault.old)} times: {fault.old}")
    after = before.replace(fault.old, fault.new)
    try:
        changes = ast.dump(ast.parse(before)) != ast.dump(ast.parse(after))
    except SyntaxError as error:
        raise Misplaced(f"{fault.path} is no program any more with: {fault.new}") from error
    if not changes:
        raise Misplaced(f"{fault.path} does the same with: {fault.new}")
    path.write_text(after, encoding="utf-8")
    return before


def plant_probes(faults: list[Fault], root: Path) -> None:
    """Before each statement that a fault would change, note the test that reaches it."""
    statements: dict[str, list[tuple[int, int]]] = {}
    for number, fault in enumerate(faults):
        line = statement_line(fault, root)
        statements.setdefault(fault.path, []).append((line, number))
    for path, places in statements.items():
        lines = (root / path).read_text(encoding="utf-8").splitlines(keepends=True)
        for line, number in sorted(places, reverse=True):
            text = lines[line - 1]
            indentation = text[: len(text) - len(text.lstrip())]
            lines.insert(line - 1, f"{indentation}{PROBE}({number})\n")
        (root / path).write_text("".join(lines), encoding="utf-8")


def statement_line(fault: Fault, root: Path) -> int:
    """The line, from 1, of the innermost statement that the fault changes.

    For a branch after the first (`elif`, `except`, `case`) it is that of the whole statement.
    """
    text = (root / fault.path).read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise Misplaced(f"{fault.path} holds {text.count(fault.old)} times: {fault.old}")
    same = len(os.path.commonprefix([fault.old, fault.new]))
    changed = text.count("\n", 0, text.index(fault.old) + same) + 1
    lines = text.splitlines()
    found = 0
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.stmt) or not node.lineno <= changed <= (node.end_lineno or 0):
            continue
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        is_branch = lines[first - 1].lstrip().startswith("elif ")
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_branch and not is_docstring:
            found = max(found, first)
    return found
