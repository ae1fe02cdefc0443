"""A data set of chats made of a person's files, in a new folder, and an eval set of it."""

from __future__ import annotations

import glob
import json
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from nested_core.data.data_settings import DataSettings
from nested_core.data.lines.example_parsing import FieldNames
from nested_core.data.sources.split_files import SUFFIXES, SplitFile, open_splits
from nested_core.errors import ConfigError, DatasetError
from nested_core.rooms.tables.chats import (
    ChatMaker,
    Columns,
    Row,
    read_rows,
    require_readable,
    share_system_text,
)
from nested_core.rooms.tables.dataset_split import draw_splits, require_train_alone, write_splits
from nested_core.rooms.tables.eval_set import EvalSet, TooManyQuestions, draw_eval_set
from nested_core.rooms.tables.survey import LOOKED_AT_ROWS, FileFacts, look_at
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

DEFAULT_SHARE = 0.1  # of the rows, for valid and as much for test
MAX_TEST_SHARE = 0.3  # that an eval set may ask for
EVAL_SET_NAME = "suite.jsonl"
_INDENTED = str.maketrans({"\n": "\n" + 3 * " ", "\r": "\\r", "\t": "\\t"})
_BEGINNINGS = {b"PK\3\4": "a workbook", b"\xd0\xcf\x11\xe0": "an old workbook", b"<": "HTML or XML"}
UNREAD_SUFFIXES = (".xls", ".xlsb", ".ods", ".numbers", ".doc", ".docx", ".pdf")


@dataclass(frozen=True)
class Source:
    """A person's files, opened as the splits of a data set.

    data: as it was given; facts: of each file by its name, of those rows that were looked at.
    """

    data: str
    splits: Mapping[str, SplitFile]
    facts: Mapping[str, FileFacts]

    @classmethod
    def find(cls, data: str, spool: Path, *, looks_at_all: bool) -> Source:
        """The rows of files, a folder or a data set of the hub, made lines of JSON in spool.

        A folder without a file named after a split is read as the tables and chats in it.

        looks_at_all: whether every row is looked at. Else what cannot be read is passed over.
        """
        if Path(data).is_file():
            _require_text_in_text_file(Path(data))
        if data.lower().endswith(UNREAD_SUFFIXES):
            raise ConfigError(
                f"{data} is not read here. Open it in the program that it is of and save the table "
                f"as .xlsx or as CSV UTF-8; then give that file to --data."
            )
        splits = open_splits(DataSettings(data), spool)
        if not splits and Path(data).is_dir():
            pattern = f"{glob.escape(data)}/*"
            if any(name.lower().endswith(SUFFIXES) for name in glob.glob(pattern)):
                splits = open_splits(DataSettings(pattern), spool)
        facts: dict[str, FileFacts] = {}
        for split in splits.values():
            if looks_at_all:
                require_readable(split, data, "This would lose")
                facts |= look_at(read_rows(split))
            else:
                facts |= _look_at_beginning(split)
        if looks_at_all and not facts:
            raise ConfigError(
                f"{data} has no row to train on. Give a table with names of columns in its first "
                f"row and rows below it, or a folder with such files: {', '.join(SUFFIXES)}."
            )
        return cls(data, splits, facts)

    @property
    def unknown_files(self) -> list[FileFacts]:
        """The tables whose columns have no name that says what is the question or the answer."""
        return [
            facts
            for facts in self.facts.values()
            if facts.is_table and facts.field_names is None and len(facts.columns) > 1
        ]

    @property
    def field_names(self) -> FieldNames:
        """Where the rows hold the fields of an example, if they do not under the core's names."""
        names = [facts.field_names for facts in self.facts.values() if facts.is_table]
        return next(filter(None, names), FieldNames())


def _require_text_in_text_file(path: Path) -> None:
    """Refuse a table of another kind under the name of a text file, which would be read as one."""
    if not path.name.lower().endswith((".csv", ".tsv", ".json", ".jsonl")):
        return
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _size):
        beginning = file.read(200)
    found = next((kind for mark, kind in _BEGINNINGS.items() if beginning.startswith(mark)), None)
    if found is None and b"\0" in beginning and beginning[:2] not in (BOM_UTF16_LE, BOM_UTF16_BE):
        found = "in UTF-16 without its mark, or no text"
    if found is not None:
        raise ConfigError(
            f"{path} is {found}, whatever its name says. Open it in a spreadsheet, save it as CSV "
            f"UTF-8, and give that file to --data."
        )


def _look_at_beginning(split: SplitFile) -> dict[str, FileFacts]:
    """The facts of the first rows: of all files where there are several, up to what is damaged."""
    rows = _read_until_damaged(split)
    return look_at(rows if split.parts else islice(rows, LOOKED_AT_ROWS))


def _read_until_damaged(split: SplitFile) -> Iterator[Row]:
    try:
        yield from read_rows(split)
    except DatasetError:
        return


@dataclass(frozen=True)
class Request:
    """What is to be made of a source.

    columns: of its tables; None if every row is an example.
    system: the text for rows that have none; None takes that of the chats, if they share one.
    share: of the rows, for valid and as much for test; None if they are there, or the default.
    questions: of the eval set; None without one.
    drop: fields of the rows that are left out.
    """

    columns: Columns | None
    system: str | None = None
    share: float | None = None
    questions: int | None = None
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """What was made: the rows of each split, the first chats of train, and rows left out.

    left_out: the places of rows without a text in one of their columns, by that column.
    blanks: the places of rows whose question has no text of one of its columns, by that column.
    nulls: how many answers have null for an empty cell, by its column.
    unused: columns that are no part of any chat.
    """

    rows: Mapping[str, int]
    first: Sequence[bytes]
    left_out: Mapping[str, Sequence[str]]
    blanks: Mapping[str, Sequence[str]]
    nulls: Mapping[str, int]
    unused: Sequence[str]
    eval_set: EvalSet | None


def make_data_set(source: Source, request: Request, target: Path) -> DataSet:
    """Write the splits as chats, and the eval set as suite.jsonl, into a new folder.

    Raises ConfigError or DatasetError where that cannot be done; then there is no folder.
    """
    names = FieldNames(**{**vars(source.field_names), "drop": request.drop})
    maker = ChatMaker(request.columns, names, request.system or "")
    if request.system is None and request.columns is not None:
        every = (row for split in source.splits.values() for row in read_rows(split))
        maker.system = share_system_text(every, maker)
    parts = {name: list(_make_lines(split, maker)) for name, split in source.splits.items()}
    if not parts.get("train"):
        raise ConfigError(
            f"{source.data}: no row has a text in {' and '.join(maker.left_out) or 'it'}, so there "
            f"is nothing to train on. Name columns that are filled."
        )
    if maker.repeats == sum(map(len, parts.values())):
        raise ConfigError(
            f"{source.data}: every answer is the text of its question, so there is nothing to "
            f"learn. Name another column for the answer."
        )
    if parts.keys() == {"train"} or request.share is not None:
        require_train_alone(source.data, source.splits)
        parts = _draw(parts["train"], source.data, request)
    eval_set = None
    if request.questions is not None:
        held_out = next((parts[name] for name in ("test", "valid") if parts.get(name)), [])
        eval_set = draw_eval_set(parts["train"], held_out, request.questions)
    write_splits(parts | ({} if eval_set is None else {"suite": eval_set.lines}), target)
    return DataSet(
        rows={name: len(lines) for name, lines in parts.items()},
        first=parts["train"][:3],
        left_out=maker.left_out,
        blanks=maker.blanks,
        nulls=maker.nulls,
        unused=_list_unused(source, request.columns),
        eval_set=eval_set,
    )


def _make_lines(split: SplitFile, maker: ChatMaker) -> Iterator[bytes]:
    for row in read_rows(split):
        if (line := maker.make_line(row)) is not None:
            yield line


def _draw(rows: Sequence[bytes], data: str, request: Request) -> dict[str, list[bytes]]:
    most = max(1, int(MAX_TEST_SHARE * len(rows)))
    asked = request.questions
    if asked is not None and not 0 < asked <= most:
        share = f"{MAX_TEST_SHARE:.0%} of {len(rows):,} rows are held out for it at most"
        raise TooManyQuestions(asked, most, share)
    drawn = DEFAULT_SHARE if request.share is None else request.share
    return draw_splits(rows, drawn, data, asked or 1)


def _list_unused(source: Source, columns: Columns | None) -> list[str]:
    used = () if columns is None else columns.names
    names = [name for facts in source.facts.values() if facts.is_table for name in facts.columns]
    return [] if columns is None else [name for name in dict.fromkeys(names) if name not in used]


def first_chats(source: Source) -> list[bytes]:
    """The first chats of train in a table whose columns the core knows; none if rows are bad."""
    is_table = any(facts.is_table for facts in source.facts.values())
    if not is_table or source.unknown_files or "train" not in source.splits:
        return []
    maker = ChatMaker(None, source.field_names, "")
    lines = map(maker.make_line, islice(_read_until_damaged(source.splits["train"]), 3))
    with suppress(DatasetError):  # the report on the data set says what is wrong
        return [line for line in lines if line is not None]
    return []


def describe_chat(line: bytes) -> list[str]:
    """The turns of a chat, each on a line of its own, with further lines of it indented."""
    turns = json.loads(line)["messages"]
    return [f"{turn['role']}: {str(turn.get('content')).translate(_INDENTED)}" for turn in turns]
