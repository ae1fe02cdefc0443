"""How a command ends: its result on standard output, as one JSON document or to be read.

Nothing is printed while the command works: then standard output is not its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flows.terminal.console import print_json, print_line, print_progress
from nested_core.errors import ConfigError, DatasetError
from nested_core.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from nested_core.models.adapter_formats import Conversion


def add_output_flag(
    parser: argparse.ArgumentParser,
    help_text: str,
    *names: str,
    metavar: str = "FILE",
    required: bool = False,
) -> None:
    """Add -o and --output, where something is written, with further names of the flag."""
    flags = ("-o", "--output", *names)
    parser.add_argument(
        *flags, dest="output", type=Path, metavar=metavar, required=required, help=help_text
    )


def result_printer(
    arguments: argparse.Namespace,
    document: Callable[[], object],
    show: Callable[[], object],
    code: int = 0,
) -> Callable[[], int]:
    """What prints the document where --json asks for it, else calls `show`; it returns `code`."""

    return printer((lambda: print_json(document())) if arguments.json else show, code)


def printer(show: Callable[[], object], code: int = 0) -> Callable[[], int]:
    """What calls `show` and returns `code`, for a command without --json."""

    def finish() -> int:
        """Print the result."""
        show()
        return code

    return finish


def show_conversion(arguments: argparse.Namespace, done: Conversion) -> Callable[[], int]:
    """Say what is to be known of a converted adapter, and in the end what was written."""
    for note in done.notes:
        print_progress(f"note: {note}")
    return result_printer(arguments, done.to_json, lambda: print_line(done.describe()))


def text_printer(text: str) -> Callable[[], int]:
    """What prints a line and returns 0."""
    return printer(lambda: print_line(text))


@contextmanager
def naming_report_of_failure(run: RunDirectory) -> Iterator[None]:
    """Say where the run's page is, if the block fails after the run began.

    A new run that is refused before its first step leaves nothing behind: the same command works
    once what was wrong is corrected.
    """
    is_new = not run.is_nonempty()
    missing = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    try:
        yield
    except BaseException as error:
        if is_new and isinstance(error, (ConfigError, DatasetError)):
            run.remove_if_never_began(missing)
        if run.report.is_file() and not isinstance(error, ConfigError):
            print_progress(f"report: {run.report}")
        raise
