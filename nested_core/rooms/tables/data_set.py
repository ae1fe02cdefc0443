"""A data set made of a person's files, in a new folder, and an eval set of it."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from nested_core.data.held_out_rows import group_key
from nested_core.data.lines.example_parsing import FieldNames
from nested_core.data.lines.line_rows import fold_text
from nested_core.errors import ConfigError, DatasetError, join_first_values
from nested_core.registry.data_store import read_lineage, read_stored_data, render_row
from nested_core.registry.queries import read_champion
from nested_core.rooms.tables.chats import LEFT_OUT, ChatMaker, Columns, read_rows, to_text
from nested_core.rooms.tables.dataset_split import RowTexts, SplitRequest, draw_splits
from nested_core.rooms.tables.eval_set import EvalSet, draw_eval_set
from nested_core.rooms.tables.source import LOOKED_AT_ROWS, Source
from nested_core.storage.atomic import new_directory, private_mode, write_bytes
from nested_core.storage.manifest import write_manifest
from nested_core.text.value_format import format_count

EVAL_SET_NAME = "suite.jsonl"
MAX_SHOWN_PLACES = 10
MAX_GROUPS = 3  # columns that are looked at
_WORD = re.compile(rb"\w+")
_PLACE = re.compile(r"\b(train|valid|test)\.jsonl:(\d+)")
# What a report says that is of use only where its folder stays.
_IN_FOLDER = re.compile(r"(?<= more): lines? [^)]*(?=\))|; `nested-tune validate .* lists them")


@dataclass(frozen=True)
class Request:
    """What kind of data set is to be made of a source.

    makes_chats: whether each row becomes a chat; else rows stay as they are.
    columns: the columns of tables; None if every row is an example already.
    system: the system text for chats that have none.
    is_split_asked_for: whether a person asked for valid and test to be drawn, which is refused if
        there are such splits.
    split: how splits are drawn, and where rows hold their fields.
    count_answer: returns the number of tokens of an answer to some turns, for an eval set; None if
        the model cannot see them all.
    group: the field whose rows stay in one split; None looks for one, and says so.
    """

    makes_chats: bool
    columns: Columns | None
    system: str | None
    is_split_asked_for: bool
    split: SplitRequest
    count_answer: Callable[[Sequence[Any], str], int | None]
    group: str | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set that was made.

    rows: the number of rows of each split.
    places: of the rows of each split in the files that they were made of.
    first_chats: the first chats of train, to be shown; empty if rows stayed as they are.
    messages: sentences for a person on rows, columns and splits.
    """

    rows: Mapping[str, int]
    places: Mapping[str, Sequence[str]]
    first_chats: Sequence[bytes]
    messages: Sequence[str]
    eval_set: EvalSet | None

    def name_rows(self, rejected: DatasetError, folder: Path, data: str) -> DatasetError:
        """Return the error on this data set in its folder as one on the files that it is of."""
        text = str(rejected).replace(str(folder), data)
        text = _PLACE.sub(lambda match: self.places[match[1]][int(match[2]) - 1], text)
        return DatasetError(_IN_FOLDER.sub("", text))


def make_data_set(source: Source, request: Request, target: Path) -> DataSet:
    """Make a data set of a person's files in a new folder: its splits, and an eval set.

    Rows become chats if the request says so. If there is only train, valid and test are drawn from
    it. The eval set, suite.jsonl, is drawn from the held-out chats.

    Raises ConfigError if there are too few rows or splits that cannot be drawn, DatasetError for a
    row that is no example; the folder does not exist then.
    """
    maker = ChatMaker(request.columns, request.split.names, request.system or "", request.group)
    make_line = maker.make_line if request.makes_chats else lambda row: row.line
    names = source.field_names
    used = {names.prompt, names.completion, names.text, names.chat}
    used |= {*request.columns.names} if request.columns else set()
    found = [name for facts in source.facts.values() for name in facts.find_groups(used)]
    fields = dict.fromkeys([request.group] if request.group else found[:MAX_GROUPS])
    parts: dict[str, list[bytes]] = {name: [] for name in source.splits}
    values: dict[str, dict[bytes, str]] = {name: {} for name in fields}
    places: dict[tuple[str, bytes], str] = {}
    for name, split in source.splits.items():
        for row in read_rows(split):
            if (line := make_line(row)) is not None:
                parts[name].append(line)
                places.setdefault((name, line), row.place)
                for field, of_field in values.items():
                    of_field[line] = group_key(to_text(row.fields.get(field))) or ""
    if request.group:
        request = replace(request, split=replace(request.split, values=values[request.group]))
    messages = [
        f"{consequence}: {format_count(len(places), 'row')} "
        f"({join_first_values(places, MAX_SHOWN_PLACES)})"
        for consequence, places in maker.empty_cells.items()
    ]
    left_out = "".join(f" {text}." for text in messages if text.startswith(LEFT_OUT))
    if not parts.get("train"):
        raise ConfigError(
            f"{source.data}: there is nothing to train on.{left_out} Name columns that are filled."
        )
    parts, sentences = _draw_missing_splits(source, request, parts, left_out)
    messages += [*sentences, *_list_unused(source, request.columns)]
    read_as = FieldNames() if request.makes_chats else request.split.names
    groups = [name for name in fields if request.group or are_alike(values[name], read_as)]
    for group in groups[:1]:
        is_asked_for = request.group is not None
        messages += _describe_groups(group, values[group], parts, is_asked_for=is_asked_for)
    eval_set = None
    count = request.split.questions
    if request.makes_chats and count != 0:
        held_out = parts.get("test") or parts.get("valid") or []
        trained = request.split.trained
        eval_set = draw_eval_set(parts["train"], held_out, count, request.count_answer, trained)
        messages += [] if eval_set is None else [eval_set.describe()]
    mode = private_mode(target.parent)
    with new_directory(target, mode=mode) as folder:
        for name, lines in (parts | ({"suite": eval_set.lines} if eval_set else {})).items():
            written = (line + b"\n" for line in lines)
            write_bytes(folder / f"{name}.jsonl", written, mode=mode & 0o666)
        write_manifest(folder, {"data": source.data})
    counts = {name: len(lines) for name, lines in parts.items()}
    of_splits = {
        name: [places.get((name, line)) or places["train", line] for line in lines]
        for name, lines in parts.items()
    }
    chats = parts["train"][:3] if request.makes_chats else ()
    return DataSet(counts, of_splits, chats, messages, eval_set)


def _draw_missing_splits(
    source: Source, request: Request, parts: dict[str, list[bytes]], left_out: str
) -> tuple[dict[str, list[bytes]], Iterable[str]]:
    """Return the rows of each split, drawn from train if there is no other, and sentences on them.

    parts: the rows of each split of the source.
    left_out: the sentence on rows that were left out, for a message.

    Raises ConfigError if splits were asked for and there are some, or if there are too few rows.
    """
    if request.is_split_asked_for and len(parts) > 1:
        others = " and ".join(file.name for name, file in source.splits.items() if name != "train")
        raise ConfigError(
            f"--split takes rows out of train where there is neither valid nor test; "
            f"{source.data} has {others} already. Leave --split out, or give another folder."
        )
    split = replace(request.split, names=FieldNames()) if request.makes_chats else request.split
    if parts.keys() != {"train"}:
        return parts, _list_known_rows(parts, split)
    drawn = draw_splits(parts["train"], split)
    if drawn is None:
        one = f"of one {request.group}, or " if request.group else ""
        raise ConfigError(
            f"{source.data} has {format_count(len(parts['train']), 'row')}, too few to take "
            f"any out for valid and test; those {one}that ask one question count as one.{left_out}"
        )
    return drawn.lines, drawn.describe()


def are_alike(values: Mapping[bytes, str], names: FieldNames) -> bool:
    """Return whether rows of one value belong together, unlike rows of two values.

    They share more words beyond chance: rows of one article do; rows of one day, price or age may
    not. Or their questions name the value, as a country, and mostly they alone have one answer.

    values: of each row; words of the value itself do not count. names: where rows hold their texts.
    """
    rows = sorted(values, key=values.__getitem__)[:LOOKED_AT_ROWS]
    words = [{*_WORD.findall(row)} - {*_WORD.findall(values[row].encode())} for row in rows]
    answers: list[object] = []
    for at, row in enumerate(rows):
        text, value = RowTexts.of(row, names), fold_text(values[row].encode())
        answers.append(text.answer if value and value in text.question else at)  # or equal to none
    better, equal = [], []
    for index, (row, following) in enumerate(pairwise(rows)):
        if values[row] == values[following]:
            other = (index + len(rows) // 2) % len(rows)
            own = len(words[index] & words[index + 1]) - len(words[index] & words[other])
            better.append((own > 0) - (own < 0))
            given = answers[index]
            equal.append((given == answers[index + 1]) - (given == answers[other]))
    return sum(better) > 3 * math.sqrt(len(better)) or 2 * sum(equal) > len(equal)


def _describe_groups(
    group: str,
    values: Mapping[bytes, str],
    parts: Mapping[str, Sequence[bytes]],
    *,
    is_asked_for: bool,
) -> Iterator[str]:
    """Yield a sentence on the values of a field in the splits, or on those in two of them.

    values: of each row; empty where the field is.
    """
    of_split = {name: {values[line] for line in lines} - {""} for name, lines in parts.items()}
    is_apart = sum(map(len, of_split.values())) == len(set[str]().union(*of_split.values()))
    held_out = [values[line] for name, lines in parts.items() if name != "train" for line in lines]
    if shared := sum(value in of_split["train"] for value in held_out):
        remedy = "" if is_asked_for else f". If they belong together, give `--group {group}`"
        yield (
            f"warning: {shared:,} of {len(held_out):,} held-out rows share their {group} with rows "
            f"of train, which may answer them{remedy}"
        )
    elif is_asked_for and is_apart:
        counts = ", ".join(f"{name} {len(own):,}" for name, own in of_split.items())
        yield f"each {group} is in one split ({counts})"


def _list_known_rows(parts: Mapping[str, Sequence[bytes]], split: SplitRequest) -> Iterator[str]:
    """Yield a sentence for each held-out split that has questions of the champion's data."""
    for name in ("valid", "test"):
        questions = [RowTexts.of(line, split.names).question for line in parts.get(name, ())]
        if known := sum(question in split.trained for question in questions):
            rows = format_count(known, "row")
            yield f"asked in the champion's data too: {rows} of your {name} split, not trained on"


def _list_unused(source: Source, columns: Columns | None) -> Iterator[str]:
    """Yield a sentence with the columns that are no part of any chat."""
    names = [name for facts in source.facts.values() if facts.is_table for name in facts.columns]
    unused = [name for name in dict.fromkeys(names) if columns and name not in columns.names]
    if unused:
        yield f"not trained on: {', '.join(unused)}"


def read_known_questions(registry: Path, name: str) -> frozenset[bytes]:
    """Return the questions of all rows that a champion and the versions before it had.

    These are rows of train and held-out rows, as the registry keeps them; each question is in the
    form of `fold_questions`. Raises ConfigError without a champion, or if no rows are kept.
    """
    champion = read_champion(registry, name)
    versions = [] if champion is None else read_lineage(registry, name, champion)
    stored = list(filter(None, (read_stored_data(registry, name, one) for one in versions)))
    rows = [row for data in stored for row in (*data.train, *data.held_out, *data.kept_out)]
    if not rows:
        raise ConfigError(f"{name} has no champion whose rows are kept. Leave --champion out.")
    if missing := sum(data.missing for data in stored):
        warnings.warn(f"--champion: {missing:,} of its rows are not known here", stacklevel=2)
    texts = (RowTexts.of(render_row(row.row), FieldNames()) for row in rows)
    return frozenset(question for one in texts for question in (*one.asked, one.question))
