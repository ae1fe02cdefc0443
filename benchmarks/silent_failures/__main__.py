"""Run what has no row yet, and print the table.

    python -m benchmarks.silent_failures [--tool T] [--only NAME...] [--json]

Rows are kept in results/, one file a tool; `--only` runs its failures again. Planted and healthy
folders are left in build/silent_failures to look at.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.silent_failures.cases import ROOT, Case, Run, StepFailed
from benchmarks.silent_failures.failures import Failure, read_failures
from benchmarks.silent_failures.plants import make_case
from benchmarks.silent_failures.tables import RESULTS, draw_table, read_rows, write_rows
from benchmarks.silent_failures.tools import TOOLS
from benchmarks.silent_failures.tools.tool import NotApplicable, Tool
from benchmarks.silent_failures.verdict import decide

WORK = ROOT / "build/silent_failures"
KEPT_LINES = 12  # of what a command printed
PUBLIC = ("failure", "tool", "version", "noticed", "false_alarm", "said")


def main() -> int:
    """Run, keep and print rows."""
    failures = read_failures()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.silent_failures", description=__doc__
    )
    parser.add_argument("--tool", choices=TOOLS, default="nested-tune")
    parser.add_argument("--python", default=sys.executable, help="of the tool's environment")
    parser.add_argument("--only", nargs="+", choices=failures, metavar="NAME")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    tool = TOOLS[options.tool](options.python)
    path: Path = options.results / f"{tool.name}.jsonl"
    rows = read_rows(path)
    for failure in (failures[name] for name in options.only or failures):
        row = rows.get(failure.name)
        if row is None or options.only or row["version"] != tool.version():
            rows[failure.name] = run_failure(tool, failure)
            write_rows(path, [rows[name] for name in failures if name in rows])
    shown = [rows[name] for name in options.only or failures]
    if options.json:
        print(json.dumps({"rows": [{key: row[key] for key in PUBLIC} for row in shown]}))
    else:
        print(draw_table(failures, {tool.name: {row["failure"]: row for row in shown}}))
    return 0


def run_failure(tool: Tool, failure: Failure) -> dict[str, Any]:
    """Walk a tool through a healthy folder, then through the planted one until it notices."""
    began = time.monotonic()
    folder = WORK / tool.name / failure.name
    row: dict[str, Any] = {"failure": failure.name, "tool": tool.name, "version": tool.version()}
    planted = make_case(failure.name, folder / "planted", planted=True)
    try:
        if failure.name in tool.own_code:
            raise NotApplicable(f"{failure.broken} is its own code")
        twin = run_twin(tool, make_case(failure.name, folder / "healthy", planted=False))
        walk(tool, planted, failure, twin)
    except NotApplicable as reason:
        row |= {
            "noticed": "not applicable",
            "how": "",
            "named": False,
            "false_alarm": False,
            "said": str(reason),
        }
    else:
        verdict = decide(failure, planted.runs, twin)
        row |= asdict(verdict)
        if (
            verdict.noticed == "never"
            and planted.went_right is not None
            and planted.went_right(planted)
        ):
            row |= {
                "noticed": failure.earliest,
                "how": "does it right",
                "said": f"answers: {planted.answers}",
            }
        row["healthy"] = [{"command": run.command, "code": run.code} for run in twin]
    row["planted"] = [
        {
            "when": run.when,
            "command": run.command,
            "code": run.code,
            "output": last_lines(run.before + run.after),
        }
        for run in planted.runs
    ]
    row["seconds"] = round(time.monotonic() - began, 1)
    print(
        f"{tool.name} {failure.name}: {row['noticed']} {row['how']} {row['said'][:200]!r}",
        file=sys.stderr,
    )
    return row


def walk(tool: Tool, case: Case, failure: Failure, twin: list[Run]) -> None:
    """Take a case's steps, until one fails or the tool has noticed."""
    for step in case.steps:
        try:
            getattr(tool, step)(case) if isinstance(step, str) else step(case)
        except StepFailed:
            return
        if decide(failure, case.runs, twin).noticed != "never":
            return


def run_twin(tool: Tool, case: Case) -> list[Run]:
    """Take all steps of a healthy folder; equal folders are run once."""
    digest = hashlib.sha256(repr((tool.version(), case.settings, case.steps)).encode())
    for path in sorted(case.folder.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(case.folder)).encode() + path.read_bytes())
    kept = WORK / tool.name / f"twin-{digest.hexdigest()[:16]}.json"
    if kept.exists():
        return [Run(**run) for run in json.loads(kept.read_text("utf-8"))]
    for step in case.steps:
        try:
            getattr(tool, step)(case) if isinstance(step, str) else step(case)
        except StepFailed:
            break
    kept.write_text(json.dumps([asdict(run) for run in case.runs]), encoding="utf-8")
    return case.runs


def last_lines(text: str) -> str:
    """The end of what a command printed."""
    return "\n".join(line[:300] for line in text.splitlines()[-KEPT_LINES:])


if __name__ == "__main__":
    sys.exit(main())
