"""The rows that are kept in results/, and tables of them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.silent_failures.failures import LISTS, Failure
from benchmarks.silent_failures.tools import TOOLS

Rows = Mapping[str, dict[str, Any]]  # of a tool, by failure
RESULTS = Path(__file__).with_name("results")
MISSES = Path(__file__).with_name("misses.toml")


def find_results(listed: str) -> Path:
    """The folder with the rows of one of the lists."""
    return RESULTS if listed == LISTS[0] else RESULTS / listed


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """A tool's rows by failure; empty if there is no file."""
    if not path.exists():
        return {}
    rows = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    return {row["failure"]: row for row in rows}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows of a tool, one a line."""
    lines = (f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def read_all_rows(listed: str = LISTS[0]) -> dict[str, Rows]:
    """The rows of each tool that has any of this list."""
    kept = {name: read_rows(find_results(listed) / f"{name}.jsonl") for name in TOOLS}
    return {name: rows for name, rows in kept.items() if rows}


def read_misses() -> dict[str, str]:
    """Why nested-tune misses a failure, by its name."""
    return tomllib.loads(MISSES.read_text("utf-8"))


def draw_table(failures: Mapping[str, Failure], tools: Mapping[str, Rows]) -> str:
    """A markdown table: a line a failure, a column a tool, and counts below."""
    headings = " | ".join(" ".join(head(tool)).strip() for tool in tools)
    lines = [f"| failure | {headings} |", "|---|" + "---|" * len(tools)]
    for name, failure in failures.items():
        cells = [describe(rows.get(name)) for rows in tools.values()]
        if any(cells):
            lines.append(f"| {failure.kind} | {' | '.join(cells)} |")
    counts = [count(rows) for rows in tools.values()]
    return "\n".join([*lines, f"| **noticed** | {' | '.join(counts)} |"])


def head(tool: str) -> tuple[str, str]:
    """A column's heading: the tool, and in brackets its backend that is run, if it has several."""
    backend = TOOLS[tool].backend
    return tool, f"({backend})" if backend else ""


def describe(row: Mapping[str, Any] | None) -> str:
    """A cell: when it was noticed, with marks for a refusal without the word and a false alarm."""
    if row is None:
        return ""
    unnamed = row["how"] == "refused" and not row["named"]
    alarm = " (false alarm)" if row["false_alarm"] else ""
    return f"{row['noticed']}{', not named' if unnamed else ''}{alarm}"


def count(rows: Rows) -> str:
    """How many failures a tool noticed of those that apply to it, and its false alarms."""
    outside = {"not applicable", "not run"}
    applicable = [row for row in rows.values() if row["noticed"] not in outside]
    if not applicable:
        return "not run"
    noticed = sum(row["noticed"] != "never" for row in applicable)
    alarms = sum(row["false_alarm"] for row in applicable)
    return f"{noticed} of {len(applicable)}, false alarms {alarms}"
