"""init of a person's own tables: its flags, the data set that it makes, and what it says of it."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flows.rooms.tables.column_flags import (
    TABLE_FLAGS,
    ColumnFlags,
    ask_or_refuse,
    read_numbers,
    require_file,
    write_command,
)
from flows.terminal.console import print_progress
from nested_core.errors import ConfigError, DatasetError, join_first_values
from nested_core.storage.output_places import require_free_place, require_new_output
from nested_core.text.value_format import format_count

if TYPE_CHECKING:
    from nested_core.rooms.tables.data_set import DataSet

MAX_SHOWN_PLACES = 3
MAX_SHOWN_CHARACTERS = 160  # of a turn of the rows that are shown


def add_flags(init: argparse.ArgumentParser) -> None:
    """Add the flags for tables to init, and what it does with them."""
    init.set_defaults(run=run_init)
    init.add_argument(
        "--split",
        metavar="SHARE",
        help="take this share of train's rows for valid and as much for test, in a new folder "
        "here; DATA is left as it is (default for tables: 0.1)",
    )
    group = init.add_argument_group("tables: CSV, TSV, .xlsx, parquet, JSON or the hub")
    group.add_argument("--prompt-feature", metavar="COLUMN", help="the column of the question")
    group.add_argument("--completion-feature", metavar="COLUMN", help="the column of the answer")
    group.add_argument(
        "--completion-features",
        metavar="A,B",
        help="several columns: the answer is a JSON object of them",
    )
    group.add_argument(
        "--template",
        metavar="TEXT",
        help="the question made of columns, such as 'Subject: {Subject}\\n{Body}'",
    )
    group.add_argument("--system", metavar="TEXT", help="for rows that have no system text")
    group.add_argument("--system-file", type=Path, metavar="FILE", help="the same from a file")
    group.add_argument(
        "--suite",
        metavar="N",
        help="draw N held-out rows as an eval set for gate.tasks, with the score that fits",
    )


def run_init(arguments: argparse.Namespace) -> Callable[[], int]:
    """Make a data set of the rows where that is asked for or needed, and write a configuration."""
    from nested_core.rooms.tables.dataset_split import SPLIT_SEED

    if arguments.output is not None:
        require_free_place(arguments.output, "-o")  # refused before data is looked at
    write: Callable[..., Callable[[], int]] = arguments.write_configuration
    prepared = prepare(arguments)
    target, folder, made = prepared.target, prepared.folder, prepared.made
    if folder is None:
        finish = write(arguments, target, arguments.data)
        _show_first_rows(prepared.first)
        return finish
    try:
        finish = write(arguments, target, str(folder), _task_lines(made, folder))
    except BaseException as error:
        shutil.rmtree(folder)
        if isinstance(error, DatasetError) and made is None:  # name lines of the files that stay
            write(arguments, target, arguments.data)
        raise
    counts = ", ".join(f"{split}.jsonl {count:,}" for split, count in prepared.rows.items())
    print_progress(f"Written: {folder} ({counts} rows, drawn with seed {SPLIT_SEED})")
    if made is not None:
        _show_data_set(made, folder)
    _show_first_rows(prepared.first)
    return finish


@dataclass(frozen=True)
class Prepared:
    """What the configuration is for.

    target: its file; None for standard output.
    folder: the new folder with the splits; None where the data is used as it lies.
    rows: of each split in the folder.
    first: the first chats of train, where they were made of a table.
    made: more of the data set, where its rows were made chats.
    """

    target: Path | None
    folder: Path | None
    rows: Mapping[str, int]
    first: Sequence[bytes]
    made: DataSet | None = None


def prepare(arguments: argparse.Namespace) -> Prepared:
    """Look at the rows; make a data set of them where a flag asks for one, or their columns do."""
    from nested_core.rooms.tables.data_set import Request, Source, first_chats, make_data_set
    from nested_core.rooms.tables.dataset_split import split_dataset
    from nested_core.rooms.tables.eval_set import TooManyQuestions

    read_numbers(arguments)
    data, share = arguments.data, arguments.split
    is_asked = any(getattr(arguments, name) is not None for name in TABLE_FLAGS)
    require_file(arguments)
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        source = Source.find(data, Path(spool), looks_at_all=is_asked)
        flags = ColumnFlags(arguments, source)
        columns, system = flags.read_columns(), flags.read_system()
        if columns is not None:
            flags.require_columns(columns)
        asks = columns is None and bool(source.unknown_files)
        is_asked = is_asked or asks
        folder = _split_folder(data) if is_asked or share is not None else None
        target = _require_new_places(arguments, folder)  # before a person is asked
        if asks:
            columns, system = ask_or_refuse(flags, source, system)
        if folder is None:
            return Prepared(target, None, {}, first_chats(source))
        if is_asked:
            drop = tuple(arguments.drop_fields)
            request = Request(columns, system, share, arguments.suite, drop)
            try:
                made = make_data_set(source, request, folder)
            except TooManyQuestions as error:
                fewer = flags.command(suite=error.most)
                raise ConfigError(f"{error} With the most that there can be: `{fewer}`") from error
            return Prepared(target, folder, made.rows, made.first, made)
        first = first_chats(source)
    return Prepared(target, folder, split_dataset(data, share, folder), first)


def _split_folder(data: str) -> Path:
    """The folder for the splits of a data set."""
    name = Path(data).resolve().name
    if not Path(data).is_dir():  # a file, or a pattern
        name = re.split(r"[.*?\[]", name)[0].strip("-_") or Path(data).resolve().parent.name
    return Path(f"{name}-split")


def _require_new_places(arguments: argparse.Namespace, folder: Path | None) -> Path | None:
    """Return the file of -o; ConfigError if it or the folder is there, with a command that works.

    folder: where the splits would be written; None if none are.
    """
    target, taken = None, []
    changes: dict[str, Any] = {}
    try:
        target = require_new_output(arguments.output)
    except ConfigError as error:
        taken.append(str(error))
        names = (f"lora-{number}.yaml" for number in itertools.count(2))
        changes["output"] = next(name for name in names if not os.path.lexists(name))
    if folder is not None and os.path.lexists(require_free_place(folder, "--split")):
        taken.append(
            f"{folder} exists, and is not written over. Remove it to draw it anew, or take it as "
            f"it is, without --split and flags of tables."
        )
        changes |= {"data": str(folder), **dict.fromkeys(("split", *TABLE_FLAGS))}
    if taken:
        command = write_command(arguments, **changes)
        raise ConfigError(f"{' '.join(taken)} For example: `{command}`")
    return target


def _task_lines(made: DataSet | None, folder: Path) -> str:
    """The lines of `gate` that name the eval set; empty without one."""
    from nested_core.rooms.tables.data_set import EVAL_SET_NAME

    if made is None or made.eval_set is None:
        return ""
    drawn = made.eval_set
    name = re.sub(r"[^A-Za-z0-9]+", "-", folder.name.removesuffix("-split")).strip("-") or "rows"
    file = json.dumps(str(folder / EVAL_SET_NAME), ensure_ascii=False)
    return (
        f"  # {len(drawn.lines)} held-out questions: {drawn.describe_baseline()}.\n"
        f"  tasks:\n"
        f"  - {{name: {name[:64]}, file: {file}, score: {drawn.score}, "
        f"max_tokens: {drawn.max_tokens}}}\n"
    )


def _show_data_set(made: DataSet, folder: Path) -> None:
    """What was left out, labels that may be one, and the eval set."""
    from nested_core.data.data_settings import DataSettings
    from nested_core.rooms.tables.labels import tabulate_labels_of_data
    from nested_core.text.document import Text

    kinds = {"left out, without a text": made.left_out, "kept, with nothing": made.blanks}
    for kind, places_by_column in kinds.items():
        for column, places in places_by_column.items():
            listed = join_first_values(places, MAX_SHOWN_PLACES)
            print_progress(f"{kind} in {column}: {format_count(len(places), 'row')} ({listed})")
    for column, count in made.nulls.items():
        print_progress(
            f"null in the answer, for {column} is empty there: {format_count(count, 'row')}"
        )
    if made.unused:
        print_progress(f"not trained on: {', '.join(made.unused)}")
    for block in tabulate_labels_of_data(DataSettings(str(folder))):
        if isinstance(block, Text):
            print_progress(block.text)
    if made.eval_set is not None:
        drawn = made.eval_set
        split = "test" if made.rows.get("test") else "valid"
        print_progress(
            f"eval set: {len(drawn.lines)} of the {made.rows[split]} rows of {split}.jsonl, which "
            f"are not trained on, as questions; score {drawn.score}; "
            f"{drawn.describe_baseline()}"
        )


def _show_first_rows(chats: Sequence[bytes]) -> None:
    from nested_core.rooms.tables.data_set import describe_chat

    if chats:
        print_progress("The first rows as they will be trained:")
    for number, chat in enumerate(chats, 1):
        for index, turn in enumerate(describe_chat(chat)):
            shown = (
                turn if len(turn) <= MAX_SHOWN_CHARACTERS else f"{turn[:MAX_SHOWN_CHARACTERS]}..."
            )
            for line in f"{f'{number}.' if not index else '':<3}{shown}".split("\n"):
                print_progress(line)
    if chats and describe_chat(chats[0])[0].startswith("system: "):
        print_progress(
            "Send the system text with every question later, as with `chat --system`: neither "
            "`promote` nor `serve` keeps it"
        )
