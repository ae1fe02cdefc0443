"""report and runs: runs as a person reads them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from flows.commands.command_output import printer, result_printer
from flows.commands.help_pages import Commands
from flows.terminal.console import print_line, print_progress, print_table
from nested_core.errors import DamagedError
from nested_core.storage.output_places import require_output_file
from nested_core.storage.run_directory import DEFAULT_RUNS_FOLDER, RunDirectory


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    report = commands.add(
        "report", run_report, group="Inspect", example="nested-tune report runs/first"
    )
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: RUN_DIR/report.html"
    )
    runs = commands.add("runs", run_listing, json=True, group="Inspect", example="nested-tune runs")
    runs.add_argument("folder", nargs="?", type=Path, default=DEFAULT_RUNS_FOLDER, metavar="DIR")


def run_report(arguments: argparse.Namespace) -> Callable[[], int]:
    """Write a run's page, report.html.

    Exit 6 where a file of the run is damaged, which the page says.
    """
    from nested_core.report.run_report import read_report

    target = RunDirectory(arguments.run_dir).report
    if arguments.output is not None:
        target = require_output_file(arguments.output, "-o", own_run=arguments.run_dir)
    report = read_report(arguments.run_dir)
    report.write(target)
    for problem in report.run.problems:
        print_progress(f"warning: {problem}")

    code = DamagedError.exit_code if report.run.problems else 0
    return printer(lambda: print_line(f"report: {arguments.output or target}"), code)


def run_listing(arguments: argparse.Namespace) -> Callable[[], int]:
    """List the runs of a folder."""
    from nested_core.records.run_status import list_runs
    from nested_core.report.outcome import LIST_COLUMNS, LIST_NOTE, list_row, run_to_json

    runs = list_runs(arguments.folder)

    def show() -> None:
        """A row for each run."""
        if not runs:
            print_line(f"no runs in {arguments.folder}")
            return
        print_table(LIST_COLUMNS, [list_row(run) for run in runs])
        print_line(LIST_NOTE)

    return result_printer(arguments, lambda: {"runs": [run_to_json(run) for run in runs]}, show)
