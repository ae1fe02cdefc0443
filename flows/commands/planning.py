"""init and explain: a first configuration, and what one will do before it is run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.commands.command_output import result_printer, text_printer
from flows.commands.config_flags import add_config_flags, load_config_from_flags
from flows.terminal import print_line, print_page, print_progress
from nested_core.errors import ConfigError
from nested_core.storage.atomic import write_bytes
from nested_core.storage.output_places import require_output_file


def add_commands(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the commands of this module."""
    init = commands.add_parser(
        "init", parents=[shared], help="write a commented configuration for a data set and a model"
    )
    init.add_argument("--data", required=True, metavar="DIR", help="a folder with train.jsonl")
    init.add_argument("--model", required=True, metavar="MODEL", help="a folder or a hub name")
    init.add_argument(
        *("-o", "--output"), type=Path, metavar="FILE", help="default: standard output"
    )
    init.set_defaults(run=run_init)
    explain = commands.add_parser(
        "explain",
        parents=[shared],
        help="in words, what a run will train, how long, in how much memory, and what judges it",
    )
    add_config_flags(explain)
    explain.add_argument("--json", action="store_true", help="as one JSON document")
    explain.set_defaults(run=run_explain)


def run_init(arguments: argparse.Namespace) -> Callable[[], int]:
    """Look at the data and the model; write the configuration, over no file that is there."""
    from nested_core.pipeline.suggested_config import suggest_config

    output: Path | None = arguments.output
    target = None if output is None else require_output_file(output, "-o")
    if target is not None and os.path.lexists(target):
        raise ConfigError(f"{output} exists, and is not written over. Give another name after -o.")
    text = suggest_config(arguments.model, arguments.data)
    if target is not None:
        write_bytes(target, text.encode())
        return text_printer(f"Written: {output}. Next: nested-tune explain -c {output}")

    def show() -> int:
        """The configuration, as it would stand in a file."""
        print_page(text)
        return 0

    return show


def run_explain(arguments: argparse.Namespace) -> Callable[[], int]:
    """Judge the data, try a few steps in a temporary folder, and say what the run would do."""
    from nested_core.pipeline.run_explanation import explain_run

    config = load_config_from_flags(arguments)
    subjects = explain_run(config, print_progress).describe()

    def show() -> None:
        """A paragraph for each subject."""
        for subject, sentences in subjects.items():
            print_line(f"{subject}: {sentences}")

    return result_printer(arguments, lambda: subjects, show)
