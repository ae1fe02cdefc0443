"""registry: every name of a registry, with its champion and its last change."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.commands.command_output import result_printer
from flows.terminal.console import print_line, print_progress, print_table
from nested_core.errors import DamagedError
from nested_core.storage.run_directory import DEFAULT_REGISTRY


def add_commands(commands: Any) -> None:
    """Add the command."""
    fleet = commands.add("registry", run_fleet, "Registry", json=True)
    fleet.add_argument(
        "registry",
        type=Path,
        nargs="?",
        default=DEFAULT_REGISTRY,
        metavar="DIR",
        help=f"default: {DEFAULT_REGISTRY}",
    )


def run_fleet(arguments: argparse.Namespace) -> Callable[[], int]:
    """List every name of a registry."""
    from nested_core.registry.folders import require_registry
    from nested_core.rooms.nights.fleet import COLUMNS, describe_losses, read_fleet

    require_registry(arguments.registry)
    fleet = read_fleet(arguments.registry)
    problems = [each.problem for each in fleet if each.problem is not None]

    def show() -> None:
        """Print a row for each name, then what is damaged."""
        print_table(COLUMNS, [each.cells() for each in fleet], title=str(arguments.registry))
        print_line(describe_losses(fleet))
        print_progress(*(f"damaged: {problem}" for problem in problems))

    document = {"registry": str(arguments.registry), "names": [*map(asdict, fleet)]}
    code = DamagedError.exit_code if problems else 0
    return result_printer(arguments, lambda: document, show, code)
