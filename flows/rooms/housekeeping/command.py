"""audit, gc and forget, and `runs --prune`: what nothing needs, or is lost, goes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.commands.adapter_places import add_registry_arguments
from flows.commands.command_output import result_printer, text_printer
from flows.commands.inspection import run_listing
from flows.commands.prefect_notice import tell_server
from flows.terminal.console import print_line, print_table
from nested_core.errors import ConfigError, DamagedError
from nested_core.process.current_user import current_user
from nested_core.text.digest_format import shorten_digest
from nested_core.text.value_format import format_count


def add_commands(commands: Any) -> None:
    """Add the commands that audit a registry and remove what is not needed, or is lost."""
    audit = commands.add("audit", run_registry_audit, "Registry", "support-bot", json=True)
    gc = commands.add("gc", run_gc, "Registry", "support-bot --keep 10 --dry-run", json=True)
    gc.add_argument("--keep", type=int, default=10, metavar="N", help="newest kept (default: 10)")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    gc.add_argument(
        "--forget",
        type=Path,
        metavar="FILE",
        help="take these rows or prompts (JSON Lines) out of the data store, and remove no version",
    )
    forget = commands.add(
        "forget", run_forget, "Registry", "support-bot 3785767e --by ann --reason 'a bad disk'"
    )
    for parser in (audit, gc, forget):
        add_registry_arguments(parser)
    forget.add_argument("version", metavar="VERSION", help="or its first 6 digits, or more")
    forget.add_argument("--by", required=True, metavar="WHO", help="recorded in the history")
    forget.add_argument("--reason", required=True, metavar="TEXT", help="recorded in the history")


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


def run_registry_audit(arguments: argparse.Namespace) -> Callable[[], int]:
    """Verify the registry, every file of it.

    Re-hash every version and the pointer, and compare the history with them.
    """
    from nested_core.rooms.housekeeping.registry_audit import audit

    report = audit(arguments.registry, arguments.name)

    def show() -> None:
        """Each finding with its file, or that there is none."""
        if report.findings:
            print_table(("what", "problem"), [(f.file, f.message) for f in report.findings])
            for advice in dict.fromkeys(f.advice for f in report.findings if f.advice is not None):
                print_line(advice)
        else:
            versions = format_count(len(report.versions), "version")
            print_line(f"{versions}, the champion and the history are sound")
        for note in report.notes:
            print_line(f"note: {note}")

    code = DamagedError.exit_code if report.findings else 0
    return result_printer(arguments, lambda: asdict(report), show, code)


def run_gc(arguments: argparse.Namespace) -> Callable[[], int]:
    """Remove versions that are not needed.

    Never the champion, nor what a rollback would go to. With --forget, forget rows instead.
    """
    from nested_core.rooms.housekeeping.garbage_collection import collect_garbage

    if arguments.forget is not None:
        return _forget_rows(arguments)
    done = collect_garbage(
        arguments.registry,
        arguments.name,
        by=current_user(),
        keep=arguments.keep,
        dry_run=arguments.dry_run,
    )

    def show() -> None:
        """Each version that was removed, and how much that is."""
        what = "would remove" if done.is_dry_run else "removed"
        for version in done.collected:
            print_line(f"{what} {shorten_digest(version)}")
        print_line(
            f"{what} {len(done.collected)} versions ({done.bytes / 1e6:.1f} MB), kept "
            f"{len(done.kept)}; {done.rows} stored examples; {len(done.leftovers)} temporary files "
            f"of killed processes"
        )

    return result_printer(arguments, lambda: asdict(done), show)


def _forget_rows(arguments: argparse.Namespace) -> Callable[[], int]:
    """Take the rows that a file lists out of the data store, and say which versions lost them."""
    from nested_core.rooms.housekeeping.garbage_collection import forget_rows
    from nested_core.rooms.housekeeping.row_list import read_row_list

    is_listed = read_row_list(arguments.forget)
    name, dry_run = arguments.name, arguments.dry_run
    versions = forget_rows(arguments.registry, name, is_listed, by=current_user(), dry_run=dry_run)

    def show() -> None:
        """Each version that lost rows, with how many, or that none had any."""
        what = "would lose" if dry_run else "lost"
        for version, rows in versions.items():
            print_line(f"{shorten_digest(version)} {what} {rows} stored examples")
        if not versions:
            print_line("no version has any of these rows in the data store")

    document = {"name": name, "versions": versions, "is_dry_run": dry_run}
    return result_printer(arguments, lambda: document, show)


def run_forget(arguments: argparse.Namespace) -> Callable[[], int]:
    """Record that a version is lost."""
    from nested_core.rooms.housekeeping.garbage_collection import forget

    named = arguments.registry, arguments.name, arguments.version
    version = forget(*named, by=arguments.by, reason=arguments.reason)
    tell_server(arguments.registry, arguments.name)
    return text_printer(f"forgotten: {shorten_digest(version)}")
