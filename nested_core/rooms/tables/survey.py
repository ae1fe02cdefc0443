"""What is in the columns of a person's files, and which of them look like question and answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nested_core.data.lines.example_parsing import FieldNames, find_format
from nested_core.data.lines.other_formats import is_preference_pair, suggest_field_names
from nested_core.errors import shorten
from nested_core.rooms.tables.chats import Row, to_text
from nested_core.rooms.tables.labels import find_labels

LOOKED_AT_ROWS = 1_000  # of a file, for what its columns hold
_QUESTION_NAMES = (
    *("question", "prompt", "input", "query", "instruction", "description", "body", "message"),
    *("text", "content", "source", "term", "subject", "title"),
)
_ANSWER_NAMES = (
    *("answer", "completion", "response", "reply", "output", "solution", "resolution", "label"),
    *("category", "class", "intent", "target", "definition", "translation", "sentiment", "summary"),
)


@dataclass
class ColumnFacts:
    """What the first rows of a file hold in a column."""

    filled: int = 0
    characters: int = 0
    values: Counter[str] = field(default_factory=Counter)

    @property
    def mean_characters(self) -> float:
        """The mean length of a value."""
        return self.characters / self.filled if self.filled else 0.0

    @property
    def holds_labels(self) -> bool:
        """Whether it holds a few values again and again."""
        return bool(find_labels(self.values))

    def describe(self) -> str:
        """Such as `4 different, such as billing`."""
        if not self.values:
            return "empty"
        example = shorten(self.values.most_common(1)[0][0], 30)
        return f"{len(self.values):,} different, such as {example}"


@dataclass
class FileFacts:
    """A file's columns and how many of its rows are examples as they are.

    suggested: the keys that would make examples of other rows, as the core finds them.
    """

    name: str
    rows: int = 0
    examples: int = 0
    columns: dict[str, ColumnFacts] = field(default_factory=dict)
    suggested: Counter[tuple[tuple[str, str], ...]] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        """Look at a row."""
        self.rows += 1
        is_example = find_format(row.fields, FieldNames()) is not None
        self.examples += is_example or is_preference_pair(row.fields)
        for name, value in row.fields.items():
            facts = self.columns.setdefault(name, ColumnFacts())
            if self.rows <= LOOKED_AT_ROWS and (text := to_text(value)).strip():
                facts.filled += 1
                facts.characters += len(text)
                facts.values[text] += 1
        if self.rows <= LOOKED_AT_ROWS and not is_example:
            self.suggested[tuple(suggest_field_names(row.fields).items())] += 1

    @property
    def is_table(self) -> bool:
        """Whether most of its rows are no examples by themselves."""
        return self.examples * 2 < self.rows

    @property
    def field_names(self) -> FieldNames | None:
        """Where its rows hold the fields of an example, by the names that the core knows.

        Returns None if a person has to say it: if no name is known, or if the only known one is of
        plain text and another column holds labels, which would be left out.
        """
        if not self.is_table:
            return FieldNames()
        names = dict(self.suggested.most_common(1)[0][0]) if self.suggested else {}
        text = names.get("text_feature")
        labels = [name for name, facts in self.columns.items() if facts.holds_labels]
        if not names or (text is not None and {*labels} - {text}):
            return None
        return FieldNames(
            names.get("prompt_feature", "prompt"),
            names.get("completion_feature", "completion"),
            names.get("text_feature", "text"),
            names.get("chat_feature", "messages"),
        )


def look_at(rows: Iterable[Row], most: int | None = None) -> dict[str, FileFacts]:
    """The facts of each file, in the order of the rows; of the first `most` rows of each."""
    files: dict[str, FileFacts] = {}
    for row in rows:
        facts = files.setdefault(row.file, FileFacts(row.file))
        if most is None or facts.rows < most:
            facts.add(row)
    return files


def guess_columns(columns: Mapping[str, ColumnFacts]) -> tuple[str, str] | None:
    """The columns that look most like the question and the answer; None without two columns.

    A known name comes first; else the answer is the last column of a few labels, or the longest
    text, and the question the longest text of the others.
    """
    filled = {name: facts for name, facts in columns.items() if facts.filled} or dict(columns)
    if len(filled) < 2:
        return None
    by_length = sorted(filled, key=lambda name: filled[name].mean_characters, reverse=True)
    labels = [name for name in filled if filled[name].holds_labels]
    question = _first_of(_QUESTION_NAMES, filled)
    answer = _first_of(_ANSWER_NAMES, filled, question)
    if answer is None:
        others = [name for name in [*reversed(labels), *by_length[1:], by_length[0]]]
        answer = next(name for name in others if name != question)
    if question is None:
        question = next(name for name in by_length if name != answer)
    return question, answer


def _first_of(
    names: Iterable[str], columns: Mapping[str, Any], but: str | None = None
) -> str | None:
    """The first column that has one of these names, in whatever case."""
    by_name = {column.strip().casefold(): column for column in columns if column != but}
    return next((by_name[name] for name in names if name in by_name), None)
