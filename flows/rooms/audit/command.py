"""verify --model: adapters from anywhere, each against the base that it is for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from flows.commands.command_output import result_printer
from flows.commands.inspection import find_folder, run_verify
from flows.terminal.console import ProgressLine, print_line, print_table
from nested_core.errors import GateRejected


def add_flags(verify: argparse.ArgumentParser) -> None:
    """Add --model to verify, and what it does then."""
    verify.usage = f"{verify.usage}\n       %(prog)s ADAPTER... --model BASE [--json]"
    verify.set_defaults(run=run_verify_or_audit)
    verify.add_argument(
        "--model", metavar="BASE", help="audit each ADAPTER against this base: a folder or hub name"
    )


def run_verify_or_audit(arguments: argparse.Namespace) -> Callable[[], int]:
    """Audit where a base is given; else compare two adapters."""
    return (run_verify if arguments.model is None else run_adapter_audit)(arguments)


def run_adapter_audit(arguments: argparse.Namespace) -> Callable[[], int]:
    """Audit adapters against the base of --model; return what prints the result."""
    from nested_core.rooms.audit.adapter_audit import audit_adapters

    folders = [find_folder(path, arguments.registry) for path in arguments.adapters]
    audits = audit_adapters(folders, arguments.model, ProgressLine())

    def show() -> None:
        """Print the modules of one adapter, or a row for each, and where reasons are told."""
        if len(audits) == 1:
            modules = [(m.name, m.rank, m.scale, m.effect) for m in audits[0].modules]
            print_table(("module", "rank", "scale", "effect"), modules)
            print_line(f"{audits[0].verdict}: {audits[0].summary()}")
        else:
            parent = os.path.commonpath([audit.folder.absolute().parent for audit in audits])
            rows = [
                (os.path.relpath(audit.folder, parent), audit.verdict, audit.summary())
                for audit in audits
            ]
            columns = ("adapter", "verdict", "changes, or reasons")
            print_table(columns, rows, title=f"Adapters in {parent} on {arguments.model}")
        if code:
            print_line("The reasons are explained in the project's docs/gate.md#one-adapter-alone.")

    code = 0 if all(audit.verdict == "passed" for audit in audits) else GateRejected.exit_code
    document = {"model": arguments.model, "adapters": [audit.to_json() for audit in audits]}
    return result_printer(arguments, lambda: document, show, code)
