"""A person's files: which are read as which split, and what is in their columns."""

from __future__ import annotations

import difflib
import glob
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nested_core.data.data_settings import DataSettings
from nested_core.data.lines.example_parsing import FieldNames, find_format
from nested_core.data.lines.other_formats import is_preference_pair, suggest_field_names
from nested_core.data.sources.split_files import SUFFIXES, SplitFile, open_splits
from nested_core.errors import ConfigError, DatasetError, shorten
from nested_core.records.dataset import find_place
from nested_core.rooms.tables.chats import Row, read_rows, to_text
from nested_core.rooms.tables.labels import find_labels

LOOKED_AT_ROWS = 1_000  # of a file, for what its columns hold


@dataclass
class FileFacts:
    """A file's columns and how many of its rows are examples as they are.

    columns: the texts of the first rows, by column.
    suggested: the keys that would make examples of other rows, as the core finds them.
    """

    name: str
    rows: int = 0
    examples: int = 0
    columns: dict[str, list[str]] = field(default_factory=dict)
    suggested: Counter[tuple[tuple[str, str], ...]] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        """Look at a row."""
        self.rows += 1
        is_example = find_format(row.fields, FieldNames()) is not None
        self.examples += is_example or is_preference_pair(row.fields)
        for name, value in row.fields.items():
            texts = self.columns.setdefault(name, [])
            if self.rows <= LOOKED_AT_ROWS and (text := to_text(value)).strip():
                texts.append(text)
        if self.rows <= LOOKED_AT_ROWS and not is_example:
            self.suggested[tuple(suggest_field_names(row.fields).items())] += 1

    @property
    def is_table(self) -> bool:
        """Whether most of its rows are no examples by themselves."""
        return self.examples * 2 < self.rows

    @property
    def field_names(self) -> FieldNames | None:
        """The columns that hold the fields of an example, recognised by their names.

        None if a person has to name them: if no column is recognised, or if only a column of plain
        text is, and another one holds labels, which would be left out.
        """
        if not self.is_table:
            return FieldNames()
        names = dict(self.suggested.most_common(1)[0][0]) if self.suggested else {}
        text = names.get("text_feature")
        labels = {name for name, texts in self.columns.items() if find_labels(Counter(texts))}
        if not names or (text is not None and labels - {text}):
            return None
        keys: dict[str, Any] = {key.removesuffix("_feature"): one for key, one in names.items()}
        return FieldNames(**keys)

    @property
    def is_unknown(self) -> bool:
        """Whether no name of its columns says what is the question or the answer."""
        return self.is_table and self.field_names is None and len(self.columns) > 1

    def find_groups(self, used: Container[str]) -> list[str]:
        """Return columns whose rows may belong together, such as an article or a customer.

        Their values repeat, and none of them fills a tenth of the rows. The one with the most
        values comes first. used: columns of question and answer.
        """
        rows = max(map(len, self.columns.values()), default=0)
        counts = {name: Counter(texts) for name, texts in self.columns.items() if name not in used}
        groups = {
            name: len(values)
            for name, values in counts.items()
            if values.total() == rows >= 2 * len(values) and max(values.values()) <= rows / 10
        }
        return sorted(groups, key=groups.__getitem__, reverse=True)

    def describe(self) -> str:
        """Its columns, such as `faq.csv has the columns A, B`."""
        return f"{self.name} has the columns {shorten(', '.join(self.columns), 2_000)}"

    def find_near(self, name: str | None) -> str | None:
        """The column of this name, or the one that was probably meant; None without one."""
        if name is None or name in self.columns:
            return name
        by_folded = {column.strip().casefold(): column for column in self.columns}
        near = difflib.get_close_matches(name.strip().casefold(), by_folded, 1, 0.7)
        return by_folded[near[0]] if near else None

    def guess_columns(self, question: str | None, answer: str | None) -> tuple[str, str]:
        """Return the columns of question and answer: those given, or else guesses.

        The question is guessed to be the column with the most text, the answer the last column with
        labels, or the last one.
        """
        names = [name for name, texts in self.columns.items() if texts] or [*self.columns]
        if question in (None, answer):
            others = [name for name in names if name != answer] or names
            question = max(others, key=lambda name: sum(map(len, self.columns[name])))
        if answer is None:
            others = [name for name in names if name != question] or names
            labels = [name for name in others if find_labels(Counter(self.columns[name]))]
            answer = (labels or others)[-1]
        return question, answer


@dataclass(frozen=True)
class Source:
    """A person's files, opened as the splits of a data set.

    data: as it was given; facts: of each file by its name.
    unread: the files of a folder that could hold rows, and are no part of a split.
    rejected: the first row that is no object of strict JSON; those after it were not looked at.
    """

    data: str
    splits: Mapping[str, SplitFile]
    facts: Mapping[str, FileFacts]
    unread: tuple[str, ...]
    rejected: DatasetError | None

    @classmethod
    def find(cls, data: str, spool: Path) -> Source:
        """Find the rows of files, a folder or a data set of the hub.

        In a folder without a file named after a split, all tables and files of chats are train.
        Rows that cannot be read are left out here; `require_rows` reports them.

        spool: a folder, to which the rows of tables are written as lines of JSON.

        Raises ConfigError for a folder with files named after valid or test, and none after train.
        """
        splits = open_splits(DataSettings(data), spool)
        names: list[str] = []
        if Path(data).is_dir():
            paths = sorted(Path(data).iterdir())
            names = [path.name for path in paths if path.name.lower().endswith(SUFFIXES)]
            if not splits and names:
                splits = open_splits(DataSettings(f"{glob.escape(data)}/*"), spool)
        read = [part.name for file in splits.values() for part in file.parts or (file,)]
        unread = tuple(name for name in names if name not in read)
        if splits and "train" not in splits:
            raise ConfigError(
                f"{data}: {', '.join(read)} would be held out by the name, and nothing is named "
                f"after train. Name the file to train on train.csv, or train-1.csv, train-2.csv, "
                f"with the suffix that it has. Not read: {', '.join(unread) or 'nothing'}."
            )
        facts: dict[str, FileFacts] = {}
        rejected = None
        for split in splits.values():
            try:
                for row in read_rows(split):
                    facts.setdefault(row.file, FileFacts(row.file)).add(row)
            except DatasetError as error:
                rejected = rejected or error
        return cls(data, splits, facts, unread, rejected)

    def require_rows(self) -> None:
        """Raise ConfigError if there is no row, DatasetError if a record cannot be read."""
        for split in self.splits.values():
            for line, (check, reason) in sorted(split.problems.items())[:1]:
                file, number = find_place(split.parts, split.name, split.number_of(line))
                others = len(split.problems) - 1
                more = f" (and {others:,} more)" if others else ""
                raise DatasetError(
                    f"This would lose rows of {self.data}: {file}:{number}: {check}: {reason}"
                    f"{more}. Correct the file first."
                )
        if self.rejected is not None:
            raise self.rejected
        if not self.facts:
            raise ConfigError(
                f"{self.data} has no row to train on. Give a table with names of columns in its "
                f"first row and rows below it, or a folder with such files: {', '.join(SUFFIXES)}. "
                f"Where it is a workbook or a page named as a text file, save it as CSV UTF-8."
            )

    @property
    def field_names(self) -> FieldNames:
        """Where the rows hold the fields of an example, if they do not under the core's names."""
        names = [facts.field_names for facts in self.facts.values() if facts.is_table]
        return next(filter(None, names), FieldNames())

    def describe(self) -> list[str]:
        """Which files are read as which split, and which are not."""
        read = [f"{file.name} ({split})" for split, file in self.splits.items()]
        not_read = [f"not read: {', '.join(self.unread)}"] if self.unread else []
        return [f"read: {', '.join(read)}", *not_read]
