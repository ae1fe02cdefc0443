"""import-peft and export-peft: adapters from and for PEFT."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.commands.adapter_places import add_adapter
from flows.commands.command_output import add_output_flag, show_conversion
from nested_core.pipeline.named_adapters import find_named_adapter
from nested_core.storage.output_places import require_free_place


def add_commands(commands: Any) -> None:
    """Add the commands of this module."""
    imports = commands.add(
        "import-peft", run_peft_import, "Exchange", "peft-lora --model MODEL -o adapter", json=True
    )
    imports.add_argument("folder", type=Path, metavar="PEFT_DIR")
    imports.add_argument(
        "--model", required=True, metavar="BASE", help="the base: a folder or a hub repository"
    )
    exports = commands.add(
        "export-peft", run_peft_export, "Exchange", "runs/first/adapter -o peft-adapter", json=True
    )
    add_adapter(exports)
    exports.add_argument(
        "--model", metavar="BASE", help="base_model_name_or_path (default: as the adapter says)"
    )
    for parser in (imports, exports):
        add_output_flag(parser, "a new or empty folder", "--out", metavar="DIR", required=True)


def run_peft_import(arguments: argparse.Namespace) -> Callable[[], int]:
    """Convert a PEFT adapter for mlx-lm."""
    from nested_core.rooms.peft import import_peft

    done = import_peft(arguments.folder, arguments.output, arguments.model)
    return show_conversion(arguments, done)


def run_peft_export(arguments: argparse.Namespace) -> Callable[[], int]:
    """Convert an adapter for PEFT."""
    from nested_core.rooms.peft import export_peft

    require_free_place(arguments.output, "-o")  # before anything is looked at
    adapter = find_named_adapter(arguments.folder, arguments.registry)
    done = export_peft(adapter.folder, arguments.output, arguments.model)
    return show_conversion(arguments, done)
