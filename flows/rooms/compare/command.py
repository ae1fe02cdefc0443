"""compare: runs beside each other."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.commands.command_output import add_output_flag, result_printer
from flows.terminal.console import print_blocks, print_line
from nested_core.storage.output_places import require_output_file


def add_commands(commands: Any) -> None:
    """Add the command."""
    compare = commands.add("compare", run_compare, "Inspect", "runs/first runs/second", json=True)
    compare.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN")
    add_output_flag(compare, "write a page with the curves", "--html")


def run_compare(arguments: argparse.Namespace) -> Callable[[], int]:
    """Show what differs between runs."""
    from nested_core.rooms.compare.comparison import compare_runs
    from nested_core.storage.atomic import write_page

    output: Path | None = arguments.output
    target = None if output is None else require_output_file(output, "-o")
    comparison = compare_runs(arguments.run_dirs)
    if target is not None:
        write_page(target, comparison.to_html())

    def show() -> None:
        """Print the figures, then the settings that differ."""
        print_blocks(*comparison.describe_figures(), *comparison.describe_damage())
        if output is not None:
            print_line(f"page: {output}")

    return result_printer(arguments, comparison.to_json, show)
