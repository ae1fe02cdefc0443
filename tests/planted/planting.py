"""Faults that are planted one at a time in a copy of the tree."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path


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
