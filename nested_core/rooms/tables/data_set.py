"""A data set made of a person's files, in a new folder, and an eval set of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nested_core.data.lines.example_parsing import FieldNames
from nested_core.errors import ConfigError, join_first_values
from nested_core.registry.data_store import read_lineage, read_stored_data, render_row
from nested_core.registry.queries import read_champion
from nested_core.rooms.tables.chats import ChatMaker, Columns, read_rows
from nested_core.rooms.tables.dataset_split import RowTexts, SplitRequest, draw_splits
from nested_core.rooms.tables.eval_set import EvalSet, draw_eval_set
from nested_core.rooms.tables.source import Source
from nested_core.storage.atomic import new_directory
from nested_core.storage.manifest import write_manifest
from nested_core.text.value_format import format_count

EVAL_SET_NAME = "suite.jsonl"
MAX_SHOWN_PLACES = 10


@dataclass(frozen=True)
class Request:
    """What is to be made of a source.

    makes_chats: whether each row becomes a chat; else rows stay as they are.
    columns: of its tables; None if every row is an example.
    system: the text for chats that have none.
    draws: whether valid and test are drawn although there are others, which is refused.
    split: how they are drawn, and where rows hold their fields.
    count_answer: the tokens of an answer to some turns, for an eval set; None if the model
        cannot see them all.
    """

    makes_chats: bool
    columns: Columns | None
    system: str | None
    draws: bool
    split: SplitRequest
    count_answer: Callable[[Sequence[Any], str], int | None]


@dataclass(frozen=True)
class DataSet:
    """What was made: the rows of each split, the first chats of train, and what to tell of it."""

    rows: Mapping[str, int]
    first: Sequence[bytes]
    told: Sequence[str]
    eval_set: EvalSet | None


def make_data_set(source: Source, request: Request, target: Path) -> DataSet:
    """Write the splits, and the eval set as suite.jsonl, into a new folder.

    Raises ConfigError or DatasetError where that cannot be done; then there is no folder.
    """
    maker = ChatMaker(request.columns, request.split.names, request.system or "")
    make_line = maker.make_line if request.makes_chats else lambda row: row.line
    parts = {
        name: [line for row in read_rows(split) if (line := make_line(row)) is not None]
        for name, split in source.splits.items()
    }
    told = [
        f"{what}: {format_count(len(places), 'row')} "
        f"({join_first_values(places, MAX_SHOWN_PLACES)})"
        for what, places in maker.empty.items()
    ]
    left_out = "".join(f" {text}." for text in told if text.startswith("left out"))
    if not parts.get("train"):
        raise ConfigError(
            f"{source.data}: there is nothing to train on.{left_out} Name columns that are filled."
        )
    if request.draws and len(parts) > 1:
        others = " and ".join(file.name for name, file in source.splits.items() if name != "train")
        raise ConfigError(
            f"--split takes rows out of train where there is neither valid nor test; "
            f"{source.data} has {others} already. Leave --split out, or give another folder."
        )
    names = FieldNames() if request.makes_chats else request.split.names
    if parts.keys() == {"train"}:
        drawn = draw_splits(parts["train"], replace(request.split, names=names))
        if drawn is None:
            raise ConfigError(
                f"{source.data} has {format_count(len(parts['train']), 'row')}, too few to take "
                f"any out for valid and test; those that ask one question count as one.{left_out}"
            )
        parts = drawn.lines
        told += drawn.describe()
    else:
        told += _list_known_rows(parts, replace(request.split, names=names))
    told += _list_unused(source, request.columns)
    eval_set = None
    count = request.split.questions
    if request.makes_chats and count != 0:
        held_out = parts.get("test") or parts.get("valid") or []
        known = request.split.trained
        eval_set = draw_eval_set(parts["train"], held_out, count, request.count_answer, known)
        told += [] if eval_set is None else [eval_set.describe()]
    with new_directory(target) as folder:
        for name, lines in (parts | ({"suite": eval_set.lines} if eval_set else {})).items():
            (folder / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        write_manifest(folder, {"data": source.data})
    counts = {name: len(lines) for name, lines in parts.items()}
    return DataSet(counts, parts["train"][:3] if request.makes_chats else (), told, eval_set)


def _list_known_rows(parts: Mapping[str, Sequence[bytes]], split: SplitRequest) -> Iterator[str]:
    """Say of each split of a person's own how many of its questions are known."""
    for name in ("valid", "test"):
        asked = [RowTexts.of(line, split.names).question for line in parts.get(name, ())]
        if known := sum(question in split.trained for question in asked):
            rows = format_count(known, "row")
            yield f"asked in the champion's data too: {rows} of your {name} split, not trained on"


def _list_unused(source: Source, columns: Columns | None) -> Iterator[str]:
    """Yield a sentence with the columns that are no part of any chat."""
    names = [name for facts in source.facts.values() if facts.is_table for name in facts.columns]
    unused = [name for name in dict.fromkeys(names) if columns and name not in columns.names]
    if unused:
        yield f"not trained on: {', '.join(unused)}"


def read_known_questions(registry: Path, name: str) -> frozenset[bytes]:
    """Return every question of the rows that a champion and the versions before it were given.

    Raises ConfigError where there is no champion, or none of its rows are kept.
    """
    champion = read_champion(registry, name)
    versions = [] if champion is None else read_lineage(registry, name, champion)
    kept = list(filter(None, (read_stored_data(registry, name, version) for version in versions)))
    rows = [row for data in kept for row in (*data.train, *data.held_out, *data.kept_out)]
    if not rows:
        raise ConfigError(f"{name} has no champion whose rows are kept. Leave --champion out.")
    if missing := sum(data.missing for data in kept):
        warnings.warn(f"--champion: {missing:,} of its rows are not known here", stacklevel=2)
    texts = (RowTexts.of(render_row(row.row), FieldNames()) for row in rows)
    return frozenset(question for one in texts for question in (*one.asked, one.question))
