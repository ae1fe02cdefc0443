"""init and explain: a first configuration, and what one will do before it is run."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.commands.command_output import printer, result_printer, text_printer
from flows.commands.config_flags import add_config_flags, load_config_from_flags
from flows.terminal.console import print_line, print_page, print_progress
from flows.terminal.stage_lines import showing_stages
from nested_core.errors import ConfigError, DatasetError
from nested_core.storage.atomic import write_bytes
from nested_core.storage.output_places import require_free_place, require_output_file


def add_commands(commands: Any) -> None:
    """Add the commands of this module."""
    init = commands.add(
        "init",
        run_init,
        "write a commented configuration for a data set and a model",
        group="Start",
        example="nested-tune init --data DATA --model MODEL -o lora.yaml",
    )
    init.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="a folder with train.jsonl, or a file, or a pattern such as 'rows/*.csv'",
    )
    init.add_argument("--model", required=True, metavar="MODEL", help="a folder or a hub name")
    init.add_argument(
        "--split",
        type=float,
        metavar="SHARE",
        help="take this share of train's rows for valid and as much for test, in a new folder "
        "here; DATA is left as it is",
    )
    init.add_argument(
        "--drop-fields",
        nargs="+",
        default=(),
        metavar="FIELD",
        help="fields of the rows that are left out on purpose, though they hold text",
    )
    how_long = "minutes that a run is to take with its verdict, in place of passes over the data"
    init.add_argument("--minutes", type=float, metavar="M", help=how_long)
    init.add_argument(
        "--resume-adapter-file",
        metavar="FILE",
        help="continue from this adapters.safetensors, in its shape and at a lower learning rate",
    )
    init.add_argument(
        *("-o", "--output"), type=Path, metavar="FILE", help="default: standard output"
    )
    explain = commands.add(
        "explain",
        run_explain,
        "show what a run will train, how long, and in how much memory",
        json=True,
        group="Start",
        example="nested-tune explain -c lora.yaml",
    )
    add_config_flags(explain)


def run_init(arguments: argparse.Namespace) -> Callable[[], int]:
    """Look at the data and the model; write the configuration, over no file that is there."""
    from nested_core.pipeline.suggested_config import split_command, suggest_config

    output: Path | None = arguments.output
    target = None if output is None else require_output_file(output, "-o")
    if target is not None and os.path.lexists(target):
        raise ConfigError(f"{output} exists, and is not written over. Give another name after -o.")
    data = arguments.data
    split = None if arguments.split is None else _split_place(data)
    written = "" if split is None else _write_split(data, arguments.split, split)
    try:
        dropped, adapter = arguments.drop_fields, arguments.resume_adapter_file
        minutes = arguments.minutes
        used = data if split is None else str(split)
        suggested = suggest_config(arguments.model, used, dropped, adapter, minutes=minutes)
        text = suggested.text
        if target is not None:
            write_bytes(target, text.encode())
    except BaseException as error:
        if split is not None:
            shutil.rmtree(split)
            if isinstance(error, DatasetError):  # name its lines in the files that stay
                suggest_config(arguments.model, data, dropped, adapter)
        raise
    if written:
        print_progress(written)
    print_progress(*(stats.describe_format() for stats in suggested.report.splits.values()))
    if suggested.report.splits.keys() != {"train"}:
        if warnings := suggested.report.describe_warnings():
            print_progress(warnings)
    else:
        print_progress(
            f"note: there is no data to evaluate the adapter on. To take rows out of train for it: "
            f"{split_command(arguments.model, data)}"
        )
    if target is not None:
        return text_printer(f"Written: {output}. Next: nested-tune explain -c {output}")
    return printer(lambda: print_page(text))


def _split_place(data: str) -> Path:
    """The folder for the split of a data set, which is not there yet."""
    name = Path(data).resolve().name
    if not Path(data).is_dir():  # a file, or a pattern
        name = re.split(r"[.*?\[]", name)[0].strip("-_") or Path(data).resolve().parent.name
    folder = Path(f"{name}-split")
    if os.path.lexists(require_free_place(folder, "--split")):
        raise ConfigError(
            f"{folder} exists, and is not written over. If it is the split that you want, give "
            f"--data {folder} without --split; else remove it."
        )
    return folder


def _write_split(data: str, share: float, folder: Path) -> str:
    """Split a data set that has only train; the sentence that says what is in the new folder."""
    from nested_core.data.dataset_split import SPLIT_SEED, split_dataset

    rows = split_dataset(data, share, folder)
    counts = ", ".join(f"{split}.jsonl {count:,}" for split, count in rows.items())
    return f"Written: {folder} ({counts} rows, drawn with seed {SPLIT_SEED})"


def run_explain(arguments: argparse.Namespace) -> Callable[[], int]:
    """Judge the data, try a few steps in a temporary folder, and say what the run would do."""
    config = load_config_from_flags(arguments)
    with showing_stages("explain: loading the libraries"):
        from nested_core.pipeline.run_explanation import explain_run  # loads mlx

        subjects = explain_run(config, print_progress).describe()

    def show() -> None:
        """A paragraph for each subject."""
        for subject, sentences in subjects.items():
            print_line(f"{subject}: {sentences}")

    return result_printer(arguments, lambda: subjects, show)
