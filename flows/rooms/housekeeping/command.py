"""runs --prune: old runs that nothing needs go."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict

from flows.commands.command_output import result_printer
from flows.commands.reports import run_listing
from flows.terminal.console import print_line
from nested_core.errors import ConfigError


def add_flags(runs: argparse.ArgumentParser) -> None:
    """Add the flags that remove old runs to the command that lists them."""
    runs.set_defaults(run=run_listing_or_pruning)
    runs.add_argument(
        "--prune",
        action="store_true",
        help="remove old runs that nothing needs, and spare checkpoints of others",
    )
    runs.add_argument("--keep", type=int, metavar="N", help="with --prune: the newest to keep")
    runs.add_argument(
        "--unregistered",
        action="store_true",
        help="with --prune: also runs that passed the gate and that no known registry names",
    )
    runs.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def run_listing_or_pruning(arguments: argparse.Namespace) -> Callable[[], int]:
    """Remove old runs where that is asked for; else list them."""
    if arguments.prune:
        return run_pruning(arguments)
    if arguments.keep is not None or arguments.unregistered or arguments.dry_run:
        raise ConfigError(
            "--keep, --unregistered and --dry-run belong to --prune, which removes old runs."
        )
    return run_listing(arguments)


def run_pruning(arguments: argparse.Namespace) -> Callable[[], int]:
    """Remove old runs that nothing needs, and the spare checkpoints of those that stay."""
    from nested_core.records.run_status import list_runs
    from nested_core.rooms.housekeeping.run_removal import prune_runs

    if arguments.keep is None:
        raise ConfigError("runs --prune needs --keep N: how many of the newest runs stay.")
    done = prune_runs(
        list_runs(arguments.folder),
        keep=arguments.keep,
        unregistered=arguments.unregistered,
        dry_run=arguments.dry_run,
    )

    def show() -> None:
        """Each run that was removed, each old one that stays and why, and how much was freed."""
        what = "would remove" if done.is_dry_run else "removed"
        for path in done.removed:
            print_line(f"{what} {path}")
        for path, reason in done.kept.items():
            print_line(f"kept {path}: {reason}")
        print_line(f"{what} {done.describe()}")
        if unregistered := done.describe_unregistered():
            print_line(unregistered)

    return result_printer(arguments, lambda: asdict(done), show)
