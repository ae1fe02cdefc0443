"""Rows of a table -> chats: a question of one or more columns, and an answer of one or more.

A row that is an example already, such as a chat of OpenAI's, stays the chat that it is. All get the
system text that was asked for, where they have none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nested_core.data.lines.example_parsing import (
    UNTEMPLATED_FORMATS,
    FieldNames,
    find_format,
    parse_line,
    strip_line,
)
from nested_core.data.lines.json_decoding import LineProblem, decode_json_object
from nested_core.data.sources.file_formats import NO_TEXT
from nested_core.data.sources.split_files import SplitFile
from nested_core.errors import DatasetError
from nested_core.records.dataset import find_place
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
# What a spreadsheet shows, and writes into a CSV, in the place of a formula's value
FORMULA_ERRORS = frozenset(("#N/A", "#VALUE!", "#REF!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!"))
LEFT_OUT = "left out"  # begins the note on a row that makes no chat


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are the question and the answer.

    question: a text with columns between braces, such as `Subject: {Subject}`; `{{` is a brace.
    is_object: the answer is one JSON object of all its columns, and not the text of one.
    """

    question: str
    answer: tuple[str, ...]
    is_object: bool = False

    @property
    def asked(self) -> tuple[str, ...]:
        """The columns of the question."""
        return tuple(filter(None, _PLACEHOLDER.findall(self.question)))

    @property
    def names(self) -> tuple[str, ...]:
        """Every column that is read."""
        return tuple(dict.fromkeys((*self.asked, *self.answer)))

    def read_question(self, fields: Mapping[str, Any]) -> str:
        """Return the question of a row; empty where none of its columns holds a text.

        Each column is filled once: a value is never looked through for braces.
        """
        if not any(to_text(fields.get(column)).strip() for column in self.asked):
            return ""
        return _PLACEHOLDER.sub(
            lambda match: to_text(fields.get(match[1])) if match[1] else match[0][0], self.question
        )

    def read_answer(self, fields: Mapping[str, Any]) -> str:
        """Return the answer of a row; empty where none of its columns holds a text."""
        texts = {column: to_text(fields.get(column)) for column in self.answer}
        if not any(map(str.strip, texts.values())):
            return ""
        if not self.is_object:
            return texts[self.answer[0]]
        values = {name: fields.get(name) if text.strip() else None for name, text in texts.items()}
        return json.dumps(values, ensure_ascii=False)


def to_text(value: Any) -> str:
    """Write a value as text: nothing for null, a formula's error and bytes; else as JSON does."""
    if isinstance(value, str):
        return "" if value.strip() in FORMULA_ERRORS else value
    is_no_text = value is None or isinstance(value, dict) and value.keys() == {NO_TEXT}
    return "" if is_no_text else json.dumps(value, ensure_ascii=False)


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
    """Yield the rows of a split, blank lines left out; DatasetError for one that is rejected."""
    with open_regular(split.path, UNBOUNDED, follow_links=True) as (lines, _):
        for index, raw in enumerate(lines, 1):
            if not (line := strip_line(raw, is_first=index == 1)):
                continue
            file, number = find_place(split.parts, split.name, split.number_of(index))
            try:
                fields = decode_json_object(line)
            except LineProblem as problem:
                raise DatasetError(
                    f"{file}:{number}: {problem.check}: {problem}. Correct the row, or take it out."
                ) from None
            yield Row(file, number, line, fields)


@dataclass
class ChatMaker:
    """Makes a chat of each row, and remembers the rows with an empty cell.

    columns: of tables; None if every row is an example already.
    names: where other rows hold their fields.
    system: for rows that have no system text of their own; an empty one for none.
    group: a field that chats keep beside their turns; None for none.
    empty_cells: the places of rows with an empty cell, by what became of them, such as `left out,
        without a text in Answer`.
    """

    columns: Columns | None
    names: FieldNames
    system: str
    group: str | None = None
    empty_cells: dict[str, list[str]] = field(default_factory=dict)

    def make_line(self, row: Row) -> bytes | None:
        """Return the line of JSON for a row; None if it is left out.

        Raises DatasetError for a row that is no example.
        """
        columns = self.columns
        if columns is not None and (
            row.fields.keys() >= {*columns.names} or find_format(row.fields, self.names) is None
        ):
            chat = self._read_table_row(row, columns)
        else:
            chat = self._read_example(row)
        if chat is None:
            return None
        turns = chat["messages"]
        if self.system and not (turns and turns[0]["role"] == "system"):
            chat["messages"] = [{"role": "system", "content": self.system}, *turns]
            if "loss_mask" in chat:
                chat["loss_mask"] = [1, *chat["loss_mask"]]
        if self.group is not None and (value := to_text(row.fields.get(self.group))).strip():
            chat[self.group] = value
        return json.dumps(chat, ensure_ascii=False).encode(errors="surrogatepass")

    def _read_table_row(self, row: Row, columns: Columns) -> dict[str, Any] | None:
        """Return the chat of a table's row; None, with a note, if question or answer is blank."""
        question, answer = columns.read_question(row.fields), columns.read_answer(row.fields)
        for names, text in ((columns.asked, question), (columns.answer, answer)):
            if not text.strip():
                self._note(f"{LEFT_OUT}, without a text in {' and '.join(names)}", row)
                return None
        for name in columns.names:
            if not to_text(row.fields.get(name)).strip():
                is_null = columns.is_object and name in columns.answer
                result = "null in the answer, for nothing is" if is_null else "kept, with nothing"
                self._note(f"{result} in {name}", row)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": turns}

    def _note(self, what: str, row: Row) -> None:
        self.empty_cells.setdefault(what, []).append(row.place)

    def _read_example(self, row: Row) -> dict[str, Any]:
        """Return the chat of a row that is an example; DatasetError for any other row."""
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
