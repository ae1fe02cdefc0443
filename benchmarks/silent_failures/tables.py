"""The rows that are kept in results/, and tables of them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.silent_failures.failures import Failure
from benchmarks.silent_failures.tools import TOOLS

Rows = Mapping[str, dict[str, Any]]  # of a tool, by failure
RESULTS = Path(__file__).with_name("results")
MISSES = Path(__file__).with_name("misses.toml")


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


def read_all_rows() -> dict[str, Rows]:
    """The rows of each tool that has any."""
    kept = {name: read_rows(RESULTS / f"{name}.jsonl") for name in TOOLS}
    return {name: rows for name, rows in kept.items() if rows}


def read_misses() -> dict[str, str]:
    """Why nested-tune misses a failure, by its name."""
    return tomllib.loads(MISSES.read_text("utf-8"))


def draw_table(failures: Mapping[str, Failure], tools: Mapping[str, Rows]) -> str:
    """A markdown table: a line a failure, a column a tool, and counts below."""
    lines = [f"| failure | {' | '.join(tools)} |", "|---|" + "---|" * len(tools)]
    for name, failure in failures.items():
        cells = [describe(rows.get(name)) for rows in tools.values()]
        if any(cells):
            lines.append(f"| {failure.kind} | {' | '.join(cells)} |")
    counts = [count(rows) for rows in tools.values()]
    return "\n".join([*lines, f"| **noticed** | {' | '.join(counts)} |"])


def describe(row: Mapping[str, Any] | None) -> str:
    """A cell: when it was noticed, with a mark for a false alarm."""
    if row is None:
        return ""
    return f"{row['noticed']}{' (false alarm)' if row['false_alarm'] else ''}"


def count(rows: Rows) -> str:
    """How many failures a tool noticed of those that apply to it, and its false alarms."""
    applicable = [row for row in rows.values() if row["noticed"] != "not applicable"]
    noticed = sum(row["noticed"] != "never" for row in applicable)
    alarms = sum(row["false_alarm"] for row in applicable)
    return f"{noticed} of {len(applicable)}, false alarms {alarms}"
