"""export-mlflow: copy a registry's versions and champion to MLflow's registry."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from flows.commands.adapter_places import add_registry_arguments
from flows.commands.command_output import text_printer


def add_commands(commands: Any) -> None:
    """Add the command."""
    export = commands.add("export-mlflow", run_mlflow_export, "Exchange", "support-bot")
    export.add_argument("--tracking-uri", metavar="URI", help="default: as MLflow is configured")
    add_registry_arguments(export)


def run_mlflow_export(arguments: argparse.Namespace) -> Callable[[], int]:
    """Copy versions and champion to MLflow's registry."""
    from nested_core.rooms.mlflow.mlflow_export import export_to_mlflow

    done = export_to_mlflow(arguments.registry, arguments.name, arguments.tracking_uri)
    number = done.numbers.get(done.champion) if done.champion else None
    champion = f"champion: version {number}" if number else "no champion"
    return text_printer(
        f"{len(done.added)} of {len(done.numbers)} versions added to {done.name}; {champion}. "
        f"MLflow's store is {done.store}"
    )
