"""Rows of a table -> chats: a question of one or more columns, and an answer of one or more.

A row that is an example already, such as a chat of OpenAI's, stays the chat that it is. All get the
system text that was asked for, where they have none.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydantic_core import from_json

from nested_core.data.lines.example_parsing import (
    UNTEMPLATED_FORMATS,
    FieldNames,
    find_format,
    parse_line,
    strip_line,
)
from nested_core.data.lines.json_decoding import LineProblem
from nested_core.data.sources.split_files import SplitFile
from nested_core.errors import ConfigError, DatasetError, shorten
from nested_core.records.dataset import find_place
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
# What a spreadsheet shows, and writes into a CSV, in the place of a formula's value
FORMULA_ERRORS = frozenset(("#N/A", "#VALUE!", "#REF!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!"))
_WRITTEN_CONTROLS = {r"\n": "\n", r"\t": "\t"}  # as a shell passes them on


@dataclass(frozen=True)
class Template:
    """A text with columns in it, each filled once; a value is never looked through for braces.

    parts: pieces of text and names of columns in turn, beginning and ending with a text.
    """

    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        r"""Read `Subject: {Subject}\n{Body}`: a column between braces, `{{` for a brace.

        Raises ConfigError for a brace without its partner, and for a template without a column.
        """
        parts = [""]
        end = 0
        for match in _PLACEHOLDER.finditer(text):
            parts[-1] += text[end : match.start()]
            end = match.end()
            if match[0] in ("{{", "}}"):
                parts[-1] += match[0][0]
            elif match[1]:
                parts += [match[1], ""]
            else:
                what = "names no column" if match[0] == "{}" else "has no partner"
                raise ConfigError(
                    f"--template: the {match[0]} at character {match.start() + 1} {what}. Write a "
                    f"column as {{Column}}, and {{{{ or }}}} for a brace that is a text."
                )
        parts[-1] += text[end:]
        if len(parts) == 1:
            raise ConfigError(
                f"--template: {shorten(text)!r} names no column, so every question would be the "
                f"same. Write a column as {{Column}}, such as 'Subject: {{Subject}}'."
            )
        for written, control in _WRITTEN_CONTROLS.items():
            parts[::2] = [part.replace(written, control) for part in parts[::2]]
        return cls(tuple(parts))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names."""
        return self.parts[1::2]

    def fill(self, fields: Mapping[str, Any]) -> str:
        """The text with a row's values; empty where none of the columns holds a text."""
        values = [to_text(fields.get(column)) for column in self.columns]
        if not any(map(str.strip, values)):
            return ""
        filled = list(self.parts)
        filled[1::2] = values
        return "".join(filled)


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are the question and the answer.

    is_object: the answer is one JSON object of all its columns, and not the text of one.
    """

    question: Template
    answer: tuple[str, ...]
    is_object: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Every column that is read."""
        return tuple(dict.fromkeys((*self.question.columns, *self.answer)))

    def read_answer(self, fields: Mapping[str, Any]) -> str:
        """The answer of a row; empty where none of its columns holds a text."""
        texts = [to_text(fields.get(column)) for column in self.answer]
        if not self.is_object or not any(map(str.strip, texts)):
            return texts[0] if len(texts) == 1 else ""
        values = {
            column: fields.get(column) if text.strip() else None
            for column, text in zip(self.answer, texts, strict=True)
        }
        return json.dumps(values, ensure_ascii=False)


def to_text(value: Any) -> str:
    """A value as a text: nothing for null and for a formula's error, else what JSON writes."""
    if isinstance(value, str):
        return "" if value.strip() in FORMULA_ERRORS else value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Row:
    """A row of a file, and the number that a person finds it by."""

    file: str
    number: int
    line: bytes
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        """Such as `tickets.csv:7`."""
        return f"{self.file}:{self.number}"


def read_rows(split: SplitFile) -> Iterator[Row]:
    """Yield the rows of a split; DatasetError for one that is no JSON object."""
    with open_regular(split.path, UNBOUNDED, follow_links=True) as (lines, _):
        for index, raw in enumerate(lines, 1):
            if not (line := strip_line(raw, is_first=index == 1)):
                continue
            file, number = find_place(split.parts, split.name, split.number_of(index))
            try:
                fields = from_json(line, cache_strings="keys")
            except ValueError as error:
                raise DatasetError(f"{file}:{number}: bad-json: {shorten(error, 200)}") from None
            if not isinstance(fields, dict):
                found = type(fields).__name__
                raise DatasetError(
                    f"{file}:{number}: not-an-object: expected a JSON object {{...}}, found a "
                    f"{found}"
                )
            yield Row(file, number, line, fields)


def require_readable(split: SplitFile, data: str, would: str) -> None:
    """Refuse a split with records that could not be read: they would be missing without a word.

    would: what was to be done, such as `--split would lose`.
    """
    if not split.problems:
        return
    line, (check, reason) = min(split.problems.items())
    file, number = find_place(split.parts, split.name, split.number_of(line))
    more = f" (and {len(split.problems) - 1:,} more)" if len(split.problems) > 1 else ""
    raise DatasetError(
        f"{would} rows of {data}: {file}:{number}: {check}: {reason}{more}. Correct the file first."
    )


@dataclass
class ChatMaker:
    """Makes a chat of each row, and remembers which rows were left out and why.

    columns: of tables; None if every row is an example already.
    names: where other rows hold their fields.
    system: for rows that have no system text of their own; an empty one for none.
    left_out: the places of rows without a text in one of their columns, by that column.
    blanks: the places of rows whose question has no text of one of its columns, by that column.
    nulls: how many answers have null for an empty cell, by its column.
    repeats: how many answers are the text of their question.
    """

    columns: Columns | None
    names: FieldNames
    system: str
    left_out: dict[str, list[str]] = field(default_factory=dict)
    blanks: dict[str, list[str]] = field(default_factory=dict)
    nulls: Counter[str] = field(default_factory=Counter)
    repeats: int = 0

    @cached_property
    def _question_columns(self) -> str:
        return " and ".join(self.columns.question.columns) if self.columns else ""

    def make_line(self, row: Row) -> bytes | None:
        """The line of JSON for a row; None if it is left out.

        Raises DatasetError for a row that is no example.
        """
        chat = self._read_table_row(row) if self.is_table_row(row) else self.read_example(row)
        if chat is None:
            return None
        turns = chat["messages"]
        if self.system and not (turns and turns[0]["role"] == "system"):
            chat["messages"] = [{"role": "system", "content": self.system}, *turns]
            if "loss_mask" in chat:
                chat["loss_mask"] = [1, *chat["loss_mask"]]
        return json.dumps(chat, ensure_ascii=False).encode(errors="surrogatepass")

    def is_table_row(self, row: Row) -> bool:
        """Whether its columns are those that were named, rather than those of an example."""
        if self.columns is None:
            return False
        has_all = all(name in row.fields for name in self.columns.names)
        return has_all or find_format(row.fields, self.names) is None

    def _read_table_row(self, row: Row) -> dict[str, Any] | None:
        if self.columns is None:
            return None
        question = self.columns.question.fill(row.fields)
        answer = self.columns.read_answer(row.fields)
        if not question.strip() or not answer.strip():
            empty = (
                " and ".join(self.columns.answer) if question.strip() else self._question_columns
            )
            self.left_out.setdefault(empty, []).append(row.place)
            return None
        self.repeats += question.strip() == answer.strip()
        for name in self.columns.question.columns:
            if not to_text(row.fields.get(name)).strip():
                self.blanks.setdefault(name, []).append(row.place)
        if self.columns.is_object:
            cells = {name: to_text(row.fields.get(name)) for name in self.columns.answer}
            self.nulls.update(name for name, text in cells.items() if not text.strip())
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        return {"messages": turns}

    def read_example(self, row: Row) -> dict[str, Any]:
        """The chat of a row that is an example; DatasetError for any other row."""
        try:
            example = parse_line(row.line, self.names)
        except LineProblem as problem:
            raise DatasetError(f"{row.place}: {problem.check}: {problem}") from None
        if example.format in UNTEMPLATED_FORMATS:
            raise DatasetError(
                f"{row.place} is plain text, which has no question, no answer and no system text. "
                f"Give the columns by --prompt-feature and --completion-feature, or leave the "
                f"flags of tables out."
            )
        chat: dict[str, Any] = {"messages": example.messages}
        if example.tools is not None:
            chat["tools"] = example.tools
        if example.masked:
            turns = range(len(example.messages))
            chat["loss_mask"] = [int(turn not in example.masked) for turn in turns]
        return chat


def share_system_text(rows: Iterable[Row], maker: ChatMaker) -> str:
    """The system text that rows of tables get from the chats beside them; empty for none.

    Raises ConfigError where the chats have different ones.
    """
    places: dict[str, str] = {}
    has_table = False
    for row in rows:
        if maker.is_table_row(row):
            has_table = True
        elif len(places) < 2:
            turns = maker.read_example(row)["messages"]
            has_system = bool(turns) and turns[0]["role"] == "system"
            places.setdefault(turns[0]["content"] if has_system else "", row.place)
    if has_table and len(places) > 1:
        shown = " and ".join(
            f"{shorten(text)!r} ({place})" if text else f"none ({place})"
            for text, place in places.items()
        )
        raise ConfigError(
            f"The chats have different system texts, {shown}, so it cannot be told which of them "
            f"the rows of tables belong to. Give it: --system TEXT, or --system '' for none."
        )
    return next(iter(places), "") if has_table else ""
