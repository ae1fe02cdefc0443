"""promote, rollback and history."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from flows.commands.adapter_places import add_registry_arguments
from flows.commands.command_output import result_printer
from flows.commands.help_pages import Commands
from flows.commands.prefect_notice import tell_server
from flows.terminal.console import print_line, print_progress, print_table
from nested_core.process.current_user import current_user
from nested_core.seams import is_there
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.digest_format import shorten_digest
from nested_core.text.loss_format import join_units

if TYPE_CHECKING:
    from nested_core.registry import Decision


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    promote = commands.add(
        "promote", run_promote, "Registry", "runs/first --name support-bot", json=True
    )
    promote.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    promote.add_argument("--if-champion", metavar="VERSION", help="only while this is the champion")
    rollback = commands.add(
        "rollback", run_rollback, "Registry", "support-bot --reason 'wrong answers'", json=True
    )
    rollback.add_argument("--to", metavar="VERSION", help="default: the champion before this one")
    rollback.add_argument("--by", metavar="WHO", help="recorded in history (default: this user)")
    rollback.add_argument("--reason", metavar="TEXT", help="recorded in history and alert")
    history = commands.add("history", run_history, "Registry", "support-bot", json=True)
    for parser in (promote, rollback, history):
        add_registry_arguments(parser)


def run_promote(arguments: argparse.Namespace) -> Callable[[], int]:
    """Make a run's adapter champion."""
    from nested_core.pipeline.publishing import register_and_promote_run
    from nested_core.registry import UNSET
    from nested_core.registry.promotion_policy import describe_promotion

    run = RunDirectory(arguments.run_dir)
    expected = UNSET if arguments.if_champion is None else arguments.if_champion
    done, candidate = register_and_promote_run(
        run, arguments.registry, arguments.name, by=current_user(), expected_champion=expected
    )
    tell_server(arguments.registry, arguments.name)
    if done.against_policy is not None:
        print_progress(
            f"note: the policy of {arguments.name} would not have promoted it "
            f"({done.against_policy}); a person's word counts above it, and the history says so"
        )
    notes = describe_promotion(arguments.registry, arguments.name, done, candidate)
    if notes.losses is not None:
        print_progress(notes.losses)
    if notes.warning is not None:
        print_progress(f"warning: {notes.warning}. The run's page: {run.report}")
    print_change = _print_change(arguments, done)

    def finish() -> int:
        """Print the change, then how to ask the champion, if it is this run's adapter."""
        code = print_change()
        if done.outcome in ("promoted", "already_champion") and is_there("chat"):
            named = quote(f"{arguments.registry}/{arguments.name}")
            print_progress(f"next: `nested-tune chat {named}`")
        return code

    return finish


def run_rollback(arguments: argparse.Namespace) -> Callable[[], int]:
    """Go back to a version."""
    from nested_core.registry import rollback

    done = rollback(
        arguments.registry,
        arguments.name,
        to=arguments.to,
        by=arguments.by or current_user(),
        reason=arguments.reason,
    )
    tell_server(arguments.registry, arguments.name)
    return _print_change(arguments, done)


def _print_change(arguments: argparse.Namespace, done: Decision) -> Callable[[], int]:
    """The champion after a change, and the one before it; in JSON with all digits."""
    change = {"outcome": done.outcome, "version": done.version, "previous": done.previous}
    before = "none" if done.previous is None else shorten_digest(done.previous)
    text = f"{done.outcome}: {shorten_digest(done.version)} (before: {before})"
    return result_printer(arguments, lambda: change, lambda: print_line(text))


def run_history(arguments: argparse.Namespace) -> Callable[[], int]:
    """List the changes of the champion."""
    from nested_core.registry import history, read_champion, read_version_verdicts
    from nested_core.registry.data_store import read_lineage
    from nested_core.registry.ledger import describe_author

    entries = history(arguments.registry, arguments.name)
    champion = read_champion(arguments.registry, arguments.name)
    verdicts = read_version_verdicts(arguments.registry, arguments.name)
    losses: dict[str, dict[str, Any]] = {
        version: {
            "loss": held_out.loss_after,
            "unit": held_out.unit,
            "file": held_out.file or "held-out examples",
        }
        for version, verdict in verdicts.items()
        if (held_out := verdict.validation) is not None and held_out.loss_after is not None
    }
    words = {version: verdict.describe() for version, verdict in verdicts.items()}
    lineage = [] if champion is None else read_lineage(arguments.registry, arguments.name, champion)

    def show() -> None:
        """A line for each change with its version's loss, then the verdict of each version."""
        rows = [
            (
                str(entry["time"])[:16].replace("T", " "),
                entry["action"],
                _shorten_version(entry.get("version")),
                losses.get(str(entry.get("version")), {}).get("loss"),
                _shorten_version(entry.get("previous")),
                describe_author(entry),
            )
            for entry in entries
        ]
        shown = _shorten_version(champion) or "none"
        columns = ("time (UTC)", "action", "version", "its loss", "before", "by")
        print_table(columns, rows, title=f"{arguments.name}: champion {shown}")
        files = ", ".join(sorted({own["file"] for own in losses.values()})) or "none"
        units = join_units(own["unit"] for own in losses.values())
        for version in dict.fromkeys(str(entry.get("version")) for entry in entries):
            if version in words:
                print_line(f"{shorten_digest(version)}: {words[version]}")
        print_line(f"Losses: {units}, on the data of each one's verdict ({files}).")
        if len(lineage) > 1:
            trained_from = " <- ".join(map(shorten_digest, lineage))
            how = "from the one after it, or from the base to follow it"
            print_line(f"Lineage: {trained_from} (each trained {how})")

    document = {"name": arguments.name, "champion": champion, "history": entries, "losses": losses}
    document |= {"lineage": lineage, "verdicts": words}
    return result_printer(arguments, lambda: document, show)


def _shorten_version(version: str | None) -> str | None:
    return None if version is None else shorten_digest(version)
