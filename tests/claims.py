"""The claims of the README, each with the tests that hold it: `python -m tests.claims`.

A test says by `@pytest.mark.claim("...")` which row of the table "What is guaranteed" would be
wrong if it failed. Read from the source, so that it is the same whichever tests are run.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {"slow", "reliability", "production", "soak"}


def claims_of_readme() -> list[str]:
    """The first column of the table below "What is guaranteed"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## What is guaranteed\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", section, re.MULTILINE)
    return [row for row in rows if row != "claim"]


def claimed_tests(folder: Path = ROOT / "tests") -> dict[str, list[str]]:
    """The tests of `make test` by the claim that they are marked with."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if ".claim(" not in text:
            continue
        tree = ast.parse(text)
        of_module = [
            mark
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
            for mark in _marks(node.value)
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                marks = [mark for each in node.decorator_list for mark in _marks(each)] + of_module
                if not LEFT_OUT & {name for name, _ in marks}:
                    for text in [text for name, text in marks if name == "claim"]:
                        found.setdefault(text, []).append(f"{path.name}::{node.name}")
    return found


def _marks(expression: ast.expr) -> list[tuple[str, str]]:
    """The names of the markers in a decorator or a list of them, each with its text or ""."""
    if isinstance(expression, ast.List):
        return [mark for each in expression.elts for mark in _marks(each)]
    match = re.fullmatch(r"pytest\.mark\.(\w+)(\(.*\))?", ast.unparse(expression), re.DOTALL)
    if match is None:
        return []
    arguments = expression.args if isinstance(expression, ast.Call) else []
    text = arguments[0].value if arguments and isinstance(arguments[0], ast.Constant) else ""
    return [(match[1], str(text))]


def table() -> str:
    """The claims and their tests, as Markdown."""
    tests = claimed_tests()
    lines = ["| claim | tests in `make test` |", "|---|---|"]
    for claim in claims_of_readme():
        names = ", ".join(f"`{name}`" for name in tests.get(claim, []))
        lines.append(f"| {claim} | {names} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
