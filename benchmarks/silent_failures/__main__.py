"""Run what has no row yet, and print the table.

    python -m benchmarks.silent_failures [--tool T] [--list preferences] [--only NAME...] [--json]

Rows are kept in results/, one file a tool, of the second list in results/preferences/; `--only`
runs its failures again. Planted and healthy folders are left in build/silent_failures to look at;
remove it after a change of the tool's code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.silent_failures.cases import ROOT, Case, Run
from benchmarks.silent_failures.failures import LISTS, Failure, read_failures
from benchmarks.silent_failures.plants import make_case
from benchmarks.silent_failures.steps import take
from benchmarks.silent_failures.tables import draw_table, find_results, read_rows, write_rows
from benchmarks.silent_failures.tools import TOOLS
from benchmarks.silent_failures.tools.tool import NotApplicable, NotRun, Tool
from benchmarks.silent_failures.verdict import Verdict, decide

WORK = ROOT / "build/silent_failures"
KEPT_LINES = 80  # of what a command printed
PUBLIC = ("failure", "tool", "version", "noticed", "false_alarm", "said")


def main() -> int:
    """Run, keep and print rows."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.silent_failures", description=__doc__
    )
    parser.add_argument("--tool", choices=TOOLS, default="nested-tune")
    parser.add_argument("--python", default=sys.executable, help="of the tool's environment")
    parser.add_argument("--list", choices=LISTS, default=LISTS[0], dest="listed")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--results", type=Path, help="folder in place of results/")
    options = parser.parse_args()
    failures = read_failures(options.listed)
    if unknown := set(options.only or ()) - set(failures):
        parser.error(f"{', '.join(sorted(unknown))}: no failure of {options.listed}.toml")
    tool = TOOLS[options.tool](options.python)
    if options.listed not in tool.lists:
        parser.error(f"tools/ has no commands of {tool.name} for {options.listed}.toml")
    folder: Path = options.results or find_results(options.listed)
    path = folder / f"{tool.name}.jsonl"
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
    """Walk a tool through the healthy and the planted folder, step by step, until it notices."""
    began = processor_seconds()
    folder = WORK / tool.name / failure.name
    row: dict[str, Any] = {"failure": failure.name, "tool": tool.name, "version": tool.version()}
    planted = make_case(failure.name, folder / "planted", planted=True)
    healthy = make_case(failure.name, folder / "healthy", planted=False)
    for case in (planted, healthy):
        case.environment |= tool.environment
    try:
        if tool.does_not_begin:
            raise NotRun(tool.does_not_begin)
        if failure.name in tool.own_code:
            raise NotApplicable("the code that would have to be broken is its own")
        if failure.name in tool.lacks:
            raise NotApplicable(tool.lacks[failure.name])
        verdict = walk(tool, failure, planted, healthy)
    except NotRun as reason:
        verdict = Verdict("not run", "", False, False, str(reason))
    except NotApplicable as reason:
        verdict = Verdict("not applicable", "", False, False, str(reason))
    if planted.went_right is not None and planted.answers and planted.went_right(planted):
        said = f"answers: {planted.answers}"
        verdict = replace(verdict, noticed=failure.earliest, how="does it right", said=said)
    row |= asdict(verdict)
    row["healthy"] = [describe_run(run) for run in healthy.runs]
    row["planted"] = [describe_run(run) for run in planted.runs]
    row["processor_seconds"] = round(processor_seconds() - began, 1)
    print(f"{tool.name} {failure.name}: {verdict}", file=sys.stderr)
    return row


def walk(tool: Tool, failure: Failure, planted: Case, healthy: Case) -> Verdict:
    """Take each step in the healthy folder, then in the planted one, until the tool notices."""
    verdict = decide(failure, [], [])
    kept = WORK / tool.name / "kept"
    for healthy_step, planted_step in zip(healthy.steps, planted.steps, strict=True):
        went_well = [
            take(tool, healthy, healthy_step, kept),
            take(tool, planted, planted_step, kept),
        ]
        verdict = decide(failure, planted.runs, healthy.runs)
        if not all(went_well) or verdict.noticed != "never":
            break
    return verdict


def processor_seconds() -> float:
    """What this process and its ended children have computed so far, on all cores."""
    return sum(os.times()[:4])


def describe_run(run: Run) -> dict[str, Any]:
    """What a row keeps of a command."""
    return {
        "when": run.when,
        "command": run.command,
        "code": run.code,
        "output": last_lines(run.before + run.after),
    }


def last_lines(text: str) -> str:
    """The end of what a command printed, without the padding and the rules of its tables."""
    lines = [re.sub(r" {4,}|[─━═]{4,}", " ", line)[:300] for line in text.splitlines()]
    return "\n".join(lines[-KEPT_LINES:])


if __name__ == "__main__":
    sys.exit(main())
