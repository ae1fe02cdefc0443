"""init and explain: a first configuration, and what one will do before it is run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.commands.command_output import printer, result_printer, text_printer
from flows.commands.config_flags import add_config_flags, load_config_from_flags
from flows.terminal.console import print_line, print_page, print_progress
from flows.terminal.stage_lines import showing_stages
from nested_core.config.sections import MAX_MINUTES
from nested_core.storage.atomic import write_bytes
from nested_core.storage.output_places import require_new_output


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
        "--drop-fields",
        nargs="+",
        default=(),
        metavar="FIELD",
        help="fields of the rows that are left out on purpose, though they hold text",
    )
    how_long = "minutes that a run is to take with its verdict, in place of passes over the data"
    init.add_argument("--minutes", type=_parse_minutes, metavar="M", help=how_long)
    init.add_argument(
        "--resume-adapter-file",
        metavar="FILE",
        help="continue from this adapters.safetensors, in its shape",
    )
    init.add_argument(
        *("-o", "--output"), type=Path, metavar="FILE", help="default: standard output"
    )
    init.set_defaults(write_configuration=write_configuration)  # for rooms that add flags to init
    explain = commands.add(
        "explain",
        run_explain,
        "show what a run will train, how long, and in how much memory",
        json=True,
        group="Start",
        example="nested-tune explain -c lora.yaml",
    )
    add_config_flags(explain)


def _parse_minutes(text: str) -> float:
    """The value of --minutes, as `training.minutes` takes it."""
    with suppress(ValueError):
        if 0 < (minutes := float(text)) < MAX_MINUTES:
            return minutes
    raise argparse.ArgumentTypeError(
        f"expected minutes above 0 and below {MAX_MINUTES:,}, such as 5, found {text!r}"
    )


def run_init(arguments: argparse.Namespace) -> Callable[[], int]:
    """Look at the data and the model; write the configuration, over no file that is there."""
    return write_configuration(arguments, require_new_output(arguments.output), arguments.data)


def write_configuration(
    arguments: argparse.Namespace, target: Path | None, data: str, tasks: str = ""
) -> Callable[[], int]:
    """Suggest a configuration for this data, and write it; `tasks` are lines of `gate`."""
    from nested_core.rooms.planning.suggested_config import split_command, suggest_config

    suggested = suggest_config(
        arguments.model,
        data,
        arguments.drop_fields,
        arguments.resume_adapter_file,
        tasks=tasks,
        minutes=arguments.minutes,
    )
    if target is not None:
        write_bytes(target, suggested.text.encode())
    print_progress(*(stats.describe_format() for stats in suggested.report.splits.values()))
    if suggested.report.splits.keys() != {"train"}:
        if warnings := suggested.report.describe_warnings():
            print_progress(warnings)
    else:
        print_progress(
            f"note: there is no data to evaluate the adapter on. To take rows out of train for it: "
            f"`{split_command(arguments.model, data)}`"
        )
    if target is not None:
        output = arguments.output
        return text_printer(f"Written: {output}. Next: `nested-tune explain -c {output}`")
    return printer(lambda: print_page(suggested.text))


def run_explain(arguments: argparse.Namespace) -> Callable[[], int]:
    """Judge the data, try a few steps in a temporary folder, and say what the run would do."""
    config = load_config_from_flags(arguments)
    with showing_stages("explain: loading the libraries"):
        from nested_core.pipeline.run_explanation import explain_run  # loads mlx
        from nested_core.rooms.planning.explanation import RunInWords

        subjects = RunInWords(explain_run(config, print_progress)).describe()

    def show() -> None:
        """A paragraph for each subject."""
        for subject, sentences in subjects.items():
            print_line(f"{subject}: {sentences}")

    return result_printer(arguments, lambda: subjects, show)
