"""promote, rollback, history, audit, gc and export-mlflow."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.command_output import result_printer, text_printer
from flows.current_user import current_user
from flows.terminal import print_line, print_progress, print_table
from nested_core.errors import DamagedError
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.digest_format import shorten_digest

if TYPE_CHECKING:
    from nested_core.registry import Promotion


def add_commands(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the commands of this module."""
    promote = commands.add_parser("promote", parents=[shared], help="make a run's adapter champion")
    promote.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    promote.add_argument("--if-champion", metavar="VERSION", help="only while this is the champion")
    promote.set_defaults(run=run_promote)
    rollback = commands.add_parser("rollback", parents=[shared], help="go back to a version")
    rollback.add_argument("--to", metavar="VERSION", help="default: the champion before this one")
    rollback.set_defaults(run=run_rollback)
    history = commands.add_parser("history", parents=[shared], help="the changes of the champion")
    audit = commands.add_parser("audit", parents=[shared], help="re-hash every version")
    for parser, function in ((history, run_history), (audit, run_registry_audit)):
        parser.add_argument("--json", action="store_true", help="as one JSON document")
        parser.set_defaults(run=function)
    gc = commands.add_parser("gc", parents=[shared], help="remove versions that are not needed")
    gc.add_argument("--keep", type=int, default=10, metavar="N", help="newest to keep; default: 10")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    gc.add_argument("--json", action="store_true", help="as one JSON document")
    gc.set_defaults(run=run_gc)
    export = commands.add_parser(
        "export-mlflow", parents=[shared], help="copy versions and champion to MLflow's registry"
    )
    export.add_argument("--tracking-uri", metavar="URI", help="default: as MLflow is configured")
    export.set_defaults(run=run_mlflow_export)
    for parser in (promote, rollback, history, audit, gc, export):
        add_registry_arguments(parser)


def add_registry_arguments(parser: argparse.ArgumentParser) -> None:
    """Add NAME, which may be given as --name too, and --registry."""
    help_text = "the adapter's name in the registry"
    name = parser.add_mutually_exclusive_group(required=True)
    name.add_argument("name", nargs="?", default=argparse.SUPPRESS, metavar="NAME", help=help_text)
    name.add_argument("--name", dest="name", metavar="NAME", help="the same")
    parser.add_argument(
        "--registry", type=Path, default=Path("registry"), metavar="DIR", help="default: registry"
    )


def run_promote(arguments: argparse.Namespace) -> Callable[[], int]:
    """Register a run's adapter if it is not yet, and make it the champion."""
    from nested_core.config.registry import RegistrySection
    from nested_core.config.resume import read_run_config
    from nested_core.pipeline.publishing import register_and_promote_run
    from nested_core.registry import UNSET
    from nested_core.registry.name_folders import check_name
    from nested_core.registry.promotion_policy import describe_promotion, warn_if_worse

    check_name(arguments.name)
    run = RunDirectory(arguments.run_dir)
    target = RegistrySection(path=str(arguments.registry), name=arguments.name)
    config = read_run_config(run).model_copy(update={"registry": target})
    expected = UNSET if arguments.if_champion is None else arguments.if_champion
    done = register_and_promote_run(config, run, by=current_user(), expected_champion=expected)
    if losses := describe_promotion(arguments.registry, arguments.name, done):
        print_progress(losses)
    warning = warn_if_worse(arguments.registry, arguments.name, done)
    if warning is not None:
        print_progress(f"warning: {warning}")
    print_change = _print_change(done)

    def finish() -> int:
        """Print the change, then how to ask the champion, if it is this run's adapter."""
        code = print_change()
        if done.outcome in ("promoted", "already_champion"):
            print_progress(f"next: nested-tune chat {arguments.registry / arguments.name}")
        return code

    return finish


def run_rollback(arguments: argparse.Namespace) -> Callable[[], int]:
    """Make an earlier version the champion again."""
    from nested_core.registry import rollback

    done = rollback(arguments.registry, arguments.name, to=arguments.to, by=current_user())
    return _print_change(done)


def _print_change(done: Promotion) -> Callable[[], int]:
    """The champion after a change, and the one before it."""
    return text_printer(f"{done.outcome}: {done.version} (before: {done.previous or 'none'})")


def run_history(arguments: argparse.Namespace) -> Callable[[], int]:
    """Show every change of the champion, oldest first."""
    from nested_core.registry import history, read_champion

    entries = history(arguments.registry, arguments.name)
    champion = read_champion(arguments.registry, arguments.name)

    def show() -> None:
        """A line for each change, with versions shortened."""
        columns = ("time", "action", "version", "previous", "by")
        rows = [[_shorten_version(entry.get(column)) for column in columns] for entry in entries]
        print_table(columns, rows, title=f"{arguments.name}: champion {_shorten_version(champion)}")

    document = {"name": arguments.name, "champion": champion, "history": entries}
    return result_printer(arguments, lambda: document, show)


def _shorten_version(value: Any) -> Any:
    is_digest = isinstance(value, str) and len(value) == 64
    return shorten_digest(value) if is_digest else value


def run_registry_audit(arguments: argparse.Namespace) -> Callable[[], int]:
    """Re-hash every version and the pointer, and compare the history with them."""
    from nested_core.registry import audit

    report = audit(arguments.registry, arguments.name)

    def show() -> None:
        """Each finding with its file, or that there is none."""
        if report.findings:
            print_table(("what", "problem"), [tuple(asdict(f).values()) for f in report.findings])
        else:
            print_line(f"{len(report.versions)} versions, the champion and the history are sound")

    code = DamagedError.exit_code if report.findings else 0
    return result_printer(arguments, lambda: asdict(report), show, code)


def run_gc(arguments: argparse.Namespace) -> Callable[[], int]:
    """Remove versions, but never the champion, nor what a rollback would go to."""
    from nested_core.registry import collect_garbage

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
            print_line(f"{what} {version}")
        print_line(
            f"{what} {len(done.collected)} versions ({done.bytes / 1e6:.1f} MB), kept "
            f"{len(done.kept)}; {len(done.leftovers)} leftovers of killed processes"
        )

    return result_printer(arguments, lambda: asdict(done), show)


def run_mlflow_export(arguments: argparse.Namespace) -> Callable[[], int]:
    """Copy what MLflow's registry lacks, and point its alias at the champion."""
    from nested_core.registry.mlflow_export import export_to_mlflow

    done = export_to_mlflow(arguments.registry, arguments.name, arguments.tracking_uri)
    number = done.numbers.get(done.champion) if done.champion else None
    champion = f"champion: version {number}" if number else "no champion"
    return text_printer(
        f"{len(done.added)} of {len(done.numbers)} versions added to {done.name}; {champion}"
    )
