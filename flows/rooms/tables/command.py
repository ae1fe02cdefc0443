"""init of a person's own tables: its flags, the data set that it makes, and what it says of it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from flows.commands.adapter_places import split_name
from flows.rooms.tables.column_flags import TABLE_FLAGS, ColumnFlags, require_file
from flows.terminal.console import print_progress
from nested_core.errors import ConfigError, DatasetError, shorten
from nested_core.models.base_model import require_folder_or_hub_name
from nested_core.pipeline.named_adapters import find_named_adapter
from nested_core.records.dataset import PromptFormat
from nested_core.storage.output_places import require_free_place, require_new_output

if TYPE_CHECKING:
    from nested_core.rooms.tables.data_set import DataSet

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
    init.add_argument(
        "--group", metavar="FIELD", help="rows of one value, such as a customer, go to one split"
    )
    init.add_argument(
        "--champion",
        metavar="REGISTRY/NAME",
        help="the rows are new ones for this champion: the run goes on from it, and every row "
        "whose question the champion's data has is put in train",
    )
    group = init.add_argument_group("tables: CSV, TSV, .xlsx, parquet, JSON or the hub")
    question = group.add_mutually_exclusive_group()
    question.add_argument("--prompt-feature", metavar="FIELD", help="the column of the question")
    question.add_argument(
        "--template",
        metavar="TEXT",
        help="the question made of columns, such as 'Subject: {Subject}\\n{Body}'",
    )
    answer = group.add_mutually_exclusive_group()
    answer.add_argument("--completion-feature", metavar="FIELD", help="the column of the answer")
    answer.add_argument(
        "--completion-features",
        metavar="A,B",
        help="several columns: the answer is a JSON object of them",
    )
    system = group.add_mutually_exclusive_group()
    system.add_argument("--system", metavar="TEXT", help="for rows that have no system text")
    system.add_argument("--system-file", type=Path, metavar="FILE", help="the same from a file")
    group.add_argument(
        "--suite",
        type=int,
        metavar="N",
        help="draw N held-out rows as an eval set for gate.tasks, with the score that fits; "
        "default: up to 50 where answers are a few labels; 0 draws none",
    )


def run_init(arguments: argparse.Namespace) -> Callable[[], int]:
    """Make a data set of the rows if that is needed, and write a configuration.

    Returns what prints the last lines. If the configuration cannot be written, the data set is
    removed.
    """
    if arguments.output is not None:
        require_free_place(arguments.output, "-o")  # refused before data is looked at
    prepared = prepare_data(arguments)
    folder, data_set = prepared.folder, prepared.data_set
    print_progress(*prepared.messages)
    write: Callable[..., Callable[[], int]] = arguments.write_configuration
    champion = {} if arguments.champion is None else _follow_champion(arguments.champion)
    if folder is None or data_set is None:
        return write(arguments, prepared.target, arguments.data, **champion)
    try:
        tasks = _task_lines(data_set, folder)
        finish = write(arguments, prepared.target, str(folder), tasks=tasks, **champion)
    except BaseException as error:
        shutil.rmtree(folder)
        if isinstance(error, DatasetError):
            # The message is to name lines of the files that stay, not of the removed folder
            if data_set.first_chats:
                raise data_set.name_rows(error, folder, arguments.data) from None
            write(arguments, prepared.target, arguments.data)
        raise
    counts = ", ".join(f"{split}.jsonl {count:,}" for split, count in data_set.rows.items())
    print_progress(f"Written: {folder} ({counts} rows)")
    _show_first_chats(data_set)
    return finish


class PreparedData(NamedTuple):
    """The data that a configuration is written for.

    target: the file of the configuration; None for standard output.
    folder, data_set: the new data set; None if the data is used as it is.
    messages: sentences for a person on the files and the splits.
    """

    target: Path | None
    folder: Path | None
    data_set: DataSet | None
    messages: list[str]


def prepare_data(arguments: argparse.Namespace) -> PreparedData:
    """Look at the rows of --data, and make a data set of them if a flag asks for one.

    The flags are those for tables, --split and --champion. Without them the data is used as it is.
    Raises ConfigError for flags that do not fit the files, DatasetError for rows that do not.
    """
    from nested_core.data.lines.marks import MARK_KEYS
    from nested_core.rooms.tables.data_set import Request, make_data_set, read_known_questions
    from nested_core.rooms.tables.dataset_split import (
        DEFAULT_SHARE,
        SplitRequest,
        TooManyQuestions,
        read_share,
    )
    from nested_core.rooms.tables.source import Source

    data = arguments.data
    require_file(data)
    require_folder_or_hub_name(arguments.model)
    makes_chats = any(getattr(arguments, name) is not None for name in TABLE_FLAGS)
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        source = Source.find(data, Path(spool))
        flags = ColumnFlags(arguments, source)
        if makes_chats or arguments.group is not None:
            source.require_rows()
        group, columns_of = arguments.group, source.facts.values()
        if group is not None and not any(group in facts.columns for facts in columns_of):
            raise ConfigError(f"--group: no row of {data} has a field {group!r}.")
        if makes_chats and group in ("messages", "tools", *MARK_KEYS):
            raise ConfigError(f"--group: chats have a field {group!r} of their own. Rename it.")
        with flags.giving_example():
            columns = flags.read_columns()
            share = None if arguments.split is None else read_share(arguments.split)
            system = flags.read_system()
        known = frozenset[bytes]()
        if arguments.champion is not None:
            known = read_known_questions(*split_name(arguments.champion, None))
        makes_data_set = makes_chats or share is not None or arguments.champion is not None
        folder = _split_folder(data) if makes_data_set else None
        target = _require_new_places(arguments, folder)
        messages = source.describe() if Path(data).is_dir() else []
        if folder is None:
            return PreparedData(target, None, None, messages)
        source.require_rows()
        names = replace(source.field_names, drop=tuple(arguments.drop_fields))
        split = SplitRequest(share or DEFAULT_SHARE, arguments.suite, known, names)
        count_answer = _make_answer_counter(arguments.model)
        is_asked = share is not None
        request = Request(makes_chats, columns, system, is_asked, split, count_answer, group)
        with flags.giving_example(TooManyQuestions):
            data_set = make_data_set(source, request, folder)
    return PreparedData(target, folder, data_set, [*messages, *data_set.messages])


def _make_answer_counter(model: str) -> Callable[[Sequence[Any], str], int | None]:
    """Return a function that counts the tokens of an answer to some turns.

    It returns None if the model's context is too short for both. The tokenizer is loaded at the
    first call.
    """

    @cache
    def load() -> tuple[Any, int | None]:
        """Return the model's tokenizer, and its context's length in tokens; None if unknown."""
        from nested_core.data.tokens.tokenizer_source import TokenizerSource
        from nested_core.models.base_model import context_length, find_model_folder

        folder = find_model_folder(model)
        return TokenizerSource(str(folder)).load(), context_length(folder)

    def count_answer(turns: Sequence[Any], answer: str) -> int | None:
        """Return the number of tokens of an answer; None if it does not fit after these turns."""
        from nested_core.models.generation import encode_messages

        tokenizer, context = load()
        count = len(tokenizer.encode(answer, add_special_tokens=False))
        prompt = 0
        with suppress(Exception):  # of the chat template: the report on the data will tell it
            prompt = len(encode_messages(tokenizer, turns))
        return count if context is None or prompt + count < context else None

    return count_answer


def _split_folder(data: str) -> Path:
    """Return the folder for the splits of a data set, here: `faq-split` for `data/faq.csv`."""
    name = Path(data).resolve().name
    if not Path(data).is_dir():  # a file, or a pattern
        name = re.split(r"[.*?\[]", name)[0].strip("-_") or Path(data).resolve().parent.name
    return Path(f"{name}-split")


def _require_new_places(arguments: argparse.Namespace, folder: Path | None) -> Path | None:
    """Return the file of -o; ConfigError if it or the folder exists already.

    folder: the folder for the splits; None if none are written.
    """
    target, problems = None, []
    try:
        target = require_new_output(arguments.output)
    except ConfigError as error:
        problems.append(str(error))
    if folder is not None and os.path.lexists(require_free_place(folder, "--split")):
        problems.append(
            f"{folder} exists, and is not written over. Take it as it is by `--data {folder}`, "
            f"without --split and flags of tables, or move it away."
        )
    if problems:
        raise ConfigError(" ".join(problems))
    return target


def _task_lines(data_set: DataSet, folder: Path) -> str:
    """Return the lines of the configuration's `gate` that name the eval set; empty without one."""
    from nested_core.rooms.tables.data_set import EVAL_SET_NAME

    if data_set.eval_set is None:
        return ""
    drawn = data_set.eval_set
    name = re.sub(r"[^A-Za-z0-9]+", "-", folder.name.removesuffix("-split")).strip("-") or "rows"
    file = json.dumps(str(folder / EVAL_SET_NAME), ensure_ascii=False)
    return (
        f"  # {len(drawn.lines)} held-out questions: min is above what any one answer gets.\n"
        f"  tasks:\n"
        f"  - {{name: {name[:64]}, file: {file}, score: {drawn.score}, "
        f"max_tokens: {drawn.max_tokens}, min: {drawn.least_share:g}}}\n"
    )


def _follow_champion(champion: str) -> dict[str, Any]:
    """Return arguments for `write_configuration`, so that the run goes on from the champion.

    They are the sections `registry` and `continual`, and the format of the champion's rows.
    """
    from nested_core.registry.versions import read_provenance  # brings mlx

    registry, name = split_name(champion, None)
    path = json.dumps(str(registry), ensure_ascii=False)
    lines = (
        f"registry: {{path: {path}, name: {json.dumps(name)}, promote: better}}\n"
        f"continual: {{from: champion}}  # the run goes on from it, at the learning_rate above\n"
    )
    named = find_named_adapter(registry / name, None)
    config = read_provenance(named.folder).get("config") or {}
    for task in config.get("gate", {}).get("tasks") or ():
        asked = f"the champion's eval set {task['name']} ({task['file']}) is not asked"
        print_progress(f"{asked}: name it in gate.tasks if its answers are still right")
    return {"registry": lines, "champion_format": PromptFormat.read(named.training_record)}


def _show_first_chats(data_set: DataSet) -> None:
    """Print the turns of the first chats, each on a line."""
    if data_set.first_chats:
        print_progress("The first rows as they will be trained:")
    for number, chat in enumerate(data_set.first_chats, 1):
        for index, turn in enumerate(json.loads(chat)["messages"]):
            text = shorten(str(turn.get("content")), MAX_SHOWN_CHARACTERS)
            print_progress(f"{'' if index else f'{number}.':<3}{turn['role']}: {text}")
    if any(b'"role": "system"' in chat for chat in data_set.first_chats):
        print_progress(
            "The version keeps the system text: `chat` and questions use it by themselves; `serve` "
            "says it at its start, and a request has to send it"
        )
