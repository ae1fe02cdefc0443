"""The shape of the code: which way imports point, and how long files and functions are.

`python tests/structure.py` prints it and exits with 1 where a limit is broken; it reads source text
only and imports nothing of the project.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

LAYERS = ("nested_core", "tasks", "flows")  # each may import itself and those to its left
OUTSIDE = ("deployments", "tests", "benchmarks", "examples")  # no layer may import these
UNSAFE = ("pickle", "cloudpickle", "dill", "shelve", "marshal")  # reading them can run code
MAX_FILE_LINES = 250
MAX_FUNCTION_LINES = 60
MAX_MEDIAN_FUNCTION_LINES = 10


@dataclass(frozen=True)
class Length:
    """How many lines a file, or one function in it, takes up; `place` is path or path:line name."""

    lines: int
    place: str


def sources(root: Path) -> Iterator[tuple[str, ast.Module, str]]:
    """Every Python file of the three packages: its layer, its syntax tree and its path in root."""
    for layer in LAYERS:
        for path in sorted((root / layer).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
            yield layer, tree, path.relative_to(root).as_posix()


def reversed_arrows(root: Path) -> list[str]:
    """Each import that points the wrong way, as "path:line: what is wrong", in order of place."""
    found = []
    for layer, tree, place in sources(root):
        for line, module in sorted(_imports(tree, place)):
            if fault := _fault(layer, module.split(".")[0]):
                found.append(f"{place}:{line}: {layer} imports {module}: {fault}")
    for path in sorted((root / "deployments").rglob("*.py")):
        found.append(f"{path.relative_to(root).as_posix()}:1: deployments holds data, never code")
    return found


def _fault(layer: str, package: str) -> str | None:
    """Why a layer may not import this top-level package, or None where it may."""
    if package in LAYERS and LAYERS.index(package) > LAYERS.index(layer):
        return f"the arrow is {package} -> {layer}"
    if package in OUTSIDE:
        return f"{package} is no part of the three packages"
    if package in UNSAFE:
        return "what it reads can run code"
    if layer == "nested_core" and package == "prefect":
        return "nested_core is a library without Prefect"
    return None


def _imports(tree: ast.Module, place: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module imported anywhere in a file, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, name) for name in _imported_from(node, place))
        elif isinstance(node, ast.Call) and (name := _dynamic_import(node)):
            yield node.lineno, name


def _imported_from(node: ast.ImportFrom, place: str) -> list[str]:
    """The modules that a `from` import loads; dots beyond the package reach the root folder."""
    base = list(Path(place).parent.parts)
    parents = base[: max(0, len(base) - node.level + 1)] if node.level else []
    if node.module:
        return [".".join([*parents, node.module])]
    return [".".join([*parents, alias.name]) for alias in node.names]


def _dynamic_import(node: ast.Call) -> str | None:
    """The module that a call of import_module or __import__ with a literal name loads."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
    if called not in ("import_module", "__import__") or not node.args:
        return None
    name = node.args[0]
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None


def file_lengths(root: Path) -> list[Length]:
    """The length of every file of the three packages, longest first."""
    files = [path for layer in LAYERS for path in (root / layer).rglob("*.py")]
    lengths = [
        Length(
            len(path.read_text(encoding="utf-8").splitlines()), path.relative_to(root).as_posix()
        )
        for path in files
    ]
    return sorted(lengths, key=lambda length: (-length.lines, length.place))


def function_lengths(root: Path) -> list[Length]:
    """The length of every function, docstring included and decorators not, longest first."""
    lengths = [
        Length(
            (node.end_lineno or node.lineno) - node.lineno + 1, f"{place}:{node.lineno} {node.name}"
        )
        for _, tree, place in sources(root)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return sorted(lengths, key=lambda length: (-length.lines, length.place))


def figures(root: Path) -> list[str]:
    """Largest file, longest function and median function length, one line each."""
    files, functions = file_lengths(root), function_lengths(root)
    if not files or not functions:
        return [f"{root} has no function in {', '.join(LAYERS)}"]
    middle = median(length.lines for length in functions)
    return [
        f"largest file      {files[0].lines:4d} lines, at most {MAX_FILE_LINES}: {files[0].place}",
        f"longest function  {functions[0].lines:4d} lines, at most {MAX_FUNCTION_LINES}: "
        f"{functions[0].place}",
        f"median function   {middle:4g} lines, at most {MAX_MEDIAN_FUNCTION_LINES}: "
        f"{len(functions)} functions in {len(files)} files",
    ]


def too_long(root: Path) -> list[str]:
    """Each broken limit of length, as "place: lines, limit"; none is an empty list."""
    functions = function_lengths(root)
    checks = ((file_lengths(root), MAX_FILE_LINES), (functions, MAX_FUNCTION_LINES))
    found = [
        f"{length.place}: {length.lines} lines, at most {limit}"
        for lengths, limit in checks
        for length in lengths
        if length.lines > limit
    ]
    middle = median(length.lines for length in functions) if functions else 0
    if middle > MAX_MEDIAN_FUNCTION_LINES:
        found.append(f"median function: {middle:g} lines, at most {MAX_MEDIAN_FUNCTION_LINES}")
    return found


def main(root: Path) -> int:
    """Print the figures and what breaks a rule; return 1 where anything does, else 0."""
    arrows = reversed_arrows(root)
    print("\n".join(figures(root)))
    print(f"wrong arrows      {len(arrows):4d}, of flows -> tasks -> nested_core")
    problems = [*arrows, *too_long(root)]
    print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
