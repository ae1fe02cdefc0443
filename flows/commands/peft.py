"""import-peft and export-peft: adapters from and for PEFT."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.command_output import result_printer
from flows.terminal import print_line, print_progress
from nested_core.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from nested_core.models.peft import Conversion


def add_commands(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the commands of this module."""
    imports = commands.add_parser(
        "import-peft", parents=[shared], help="a PEFT adapter, for mlx-lm and for here"
    )
    imports.add_argument("folder", type=Path, metavar="PEFT_DIR")
    imports.add_argument(
        "--model", required=True, metavar="BASE", help="the base: a folder or a hub repository"
    )
    imports.set_defaults(run=run_peft_import)
    exports = commands.add_parser(
        "export-peft", parents=[shared], help="an adapter, for PEFT and what reads its format"
    )
    exports.add_argument(
        "folder",
        type=Path,
        metavar="ADAPTER_DIR",
        help="an adapter, a run directory or REGISTRY/NAME/champion",
    )
    exports.add_argument(
        "--model", metavar="BASE", help="base_model_name_or_path; default: as the adapter says"
    )
    exports.set_defaults(run=run_peft_export)
    for parser in (imports, exports):
        parser.add_argument(
            "--out", type=Path, required=True, metavar="DIR", help="a new or empty folder"
        )
        parser.add_argument("--json", action="store_true", help="the result as one JSON document")


def run_peft_import(arguments: argparse.Namespace) -> Callable[[], int]:
    """Convert a PEFT adapter to an mlx-lm adapter directory."""
    from nested_core.models.peft import import_peft

    done = import_peft(arguments.folder, arguments.out, arguments.model)
    parameters = done.config["lora_parameters"]
    return _report_conversion(
        done, arguments, f"rank {parameters['rank']}, scale {parameters['scale']:g}"
    )


def run_peft_export(arguments: argparse.Namespace) -> Callable[[], int]:
    """Convert an mlx-lm adapter directory to a PEFT adapter."""
    from nested_core.models.peft import export_peft

    run = RunDirectory(arguments.folder)
    folder = run.adapter if run.config.is_file() else arguments.folder
    done = export_peft(folder, arguments.out, arguments.model)
    return _report_conversion(
        done, arguments, f"r {done.config['r']}, alpha {done.config['lora_alpha']:g}"
    )


def _report_conversion(
    done: Conversion, arguments: argparse.Namespace, scale_text: str
) -> Callable[[], int]:
    """Say what is to be known of a conversion, and in the end what was written."""
    for note in done.notes:
        print_progress(f"note: {note}")

    text = f"{done.out}: {done.tensors} tensors of {done.modules} modules, {scale_text}"
    return result_printer(arguments, done.to_json, lambda: print_line(text))
