"""The table of faults: what was seen of each, written as markdown when all have been injected."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

HEADER = """# Faults that were injected, measured

The evidence behind [docs/faults.md](../docs/faults.md).

Each fault is injected into processes that run: PostgreSQL, a Prefect server, two
workers, training on the example. This table is what was seen, written by

    FAULTS_TABLE=benchmarks/faults.md make production-test

Seconds are from the fault until Prefect knows, and so until the next run may start; they were
measured on {machine}.

| fault | flow run ends | on disk | seconds | and then |
|---|---|---|---|---|
"""


@dataclass
class FaultTable:
    """Rows in the order in which the tests add them."""

    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, fault: str, state: str, disk: str, seconds: float | None, then: str) -> None:
        """Note what was seen of one fault."""
        shown = "-" if seconds is None else f"{seconds:.0f}"
        self.rows.append((fault, state, disk, shown, then))

    def write(self, path: Path, machine: str) -> None:
        """Write the table."""
        lines = [
            "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in self.rows
        ]
        path.write_text(HEADER.format(machine=machine) + "\n".join(lines) + "\n", encoding="utf-8")
