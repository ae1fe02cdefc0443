"""Which columns of a table are the question and the answer: named by flags, or asked for."""

from __future__ import annotations

import argparse
import csv
import difflib
import glob
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nested_core.errors import ConfigError, DamagedError
from nested_core.storage.untrusted_files import read_regular

if TYPE_CHECKING:
    from nested_core.rooms.tables.chats import Columns
    from nested_core.rooms.tables.source import Source

TABLE_FLAGS = (
    *("prompt_feature", "template", "completion_feature", "completion_features"),
    *("system", "system_file", "suite"),
)
MAX_SYSTEM_BYTES = 2**20


def require_file(data: str) -> None:
    """Raise ConfigError for the name of a file that does not exist."""
    from nested_core.data.sources.split_files import SUFFIXES

    if not data:
        raise ConfigError("--data is empty. Give a file, a folder or a hub's name: --data faq.csv")
    path = Path(data)
    if path.name.lower().endswith(SUFFIXES) and not path.exists() and not glob.glob(data):
        close = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*")])
        hint = f" Did you mean {path.with_name(close[0])}?" if close else ""
        raise ConfigError(f"--data: there is no file {path}.{hint}")


def write_command(arguments: argparse.Namespace, **changes: Any) -> str:
    """Return the command line of init with changed flags; a value of None leaves a flag out."""
    values = {**vars(arguments), **changes}
    words = ["nested-tune", "init"]
    for name in ("data", "model", *TABLE_FLAGS, "split", "group", "champion", "minutes", "output"):
        if (value := values[name]) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


class ColumnFlags:
    """The flags for tables: which columns they name, and what is wrong with them."""

    def __init__(self, arguments: argparse.Namespace, source: Source) -> None:
        self._arguments = arguments
        self._files = list(source.facts.values())
        self._tables = [facts for facts in self._files if facts.is_table]

    @contextmanager
    def giving_example(self, problem: type[ConfigError] = ConfigError) -> Iterator[None]:
        """Extend a ConfigError that the block raises by an example of a command that would work."""
        try:
            yield
        except problem as error:
            raise ConfigError(f"{error} For example: `{self._suggest_command()}`") from error

    def _suggest_command(self) -> str:
        """Return the given command with flags that fit the first table.

        Its columns are those that the flags name, or nearly name; else the ones that look most like
        a question and an answer. Of several files it names the first table alone, since others may
        have other columns.
        """
        given = self._arguments
        changes: dict[str, Any] = dict.fromkeys((*TABLE_FLAGS, "split"))
        if self._tables:
            named = map(self._tables[0].find_near, (given.prompt_feature, given.completion_feature))
            question, answer = self._tables[0].guess_columns(*named)
            changes |= {"prompt_feature": question, "completion_feature": answer}
        if len(self._files) > 1:
            folder = Path(given.data)
            folder = folder if folder.is_dir() else folder.parent
            changes["data"] = folder / self._tables[0].name
        return write_command(given, **changes)

    def read_columns(self) -> Columns | None:
        """Return the columns that the flags name; None if they name none.

        Raises ConfigError for flags that contradict one another or name no column of a table, and,
        without flags, for a table whose columns cannot be told by their names.
        """
        from nested_core.rooms.tables.chats import Columns

        given = self._arguments
        question = given.template
        if question is not None:
            question = question.replace(r"\n", "\n").replace(r"\t", "\t")  # as a shell passes them
        elif given.prompt_feature is not None:
            question = f"{{{given.prompt_feature}}}"
        answer = given.completion_feature or given.completion_features
        if question is None and answer is None:
            self._refuse_unknown()
            return None
        if question is None or answer is None:
            needs = "--completion-feature" if question else "--prompt-feature or --template"
            raise ConfigError(f"A row is learnt as question and answer, so {needs} is needed too.")
        is_object = given.completion_feature is None
        answers = _split_names(answer) if is_object else (answer,)
        columns = Columns(question, answers, is_object)
        if not columns.asked:
            raise ConfigError(
                f"--template: {question!r} names no column, so every question would be the same. "
                f"Write a column as {{Column}}, such as 'Subject: {{Subject}}'."
            )
        if not answers or len(set(answers)) < len(answers):
            problem = "names a column twice" if answers else "names no column"
            raise ConfigError(f"--completion-features: {answer!r} {problem}.")
        if dropped := [name for name in answers if name in given.drop_fields]:
            raise ConfigError(f"--drop-fields leaves out {dropped[0]!r}, which is the answer.")
        if answers == columns.asked:
            raise ConfigError(
                f"The question and the answer are both the column {answers[0]!r}, so there is "
                f"nothing to learn. Name two columns."
            )
        self._require_columns(columns)
        return columns

    def read_system(self) -> str | None:
        """Return the system text of --system or --system-file; None without both."""
        given: str | None = self._arguments.system
        if (file := self._arguments.system_file) is None:
            return given
        try:
            text = read_regular(file, MAX_SYSTEM_BYTES, follow_links=True).decode("utf-8-sig")
        except (DamagedError, OSError) as error:
            raise ConfigError(f"--system-file: {error} Give a text file, or --system.") from error
        except UnicodeDecodeError:
            raise ConfigError(f"--system-file: {file} is not UTF-8.") from None
        if not text.strip():
            raise ConfigError(f"--system-file: {file} has no text in it.")
        return text.rstrip("\r\n")

    def _require_columns(self, columns: Columns) -> None:
        """Raise ConfigError if a table lacks one of the columns; it suggests a similar name."""
        complete = [one for one in self._files if one.columns.keys() >= set(columns.names)]
        incomplete = [one for one in self._tables if one not in complete]
        if complete and not incomplete:
            return
        facts = (incomplete or self._files)[0]
        missing = [name for name in columns.names if name not in facts.columns]
        problem = f"{facts.name} has no column {' and no column '.join(map(repr, missing))}"
        if complete:
            problem += f", as {complete[0].name} has"
        similar = [repr(column) for name in missing if (column := facts.find_near(name))]
        problem += f"; did you mean {' and '.join(similar)}?" if similar else "."
        raise ConfigError(f"{problem} {facts.describe()}.")

    def _refuse_unknown(self) -> None:
        """Raise ConfigError for tables whose columns' names do not say which is the question."""
        if unknown := [facts for facts in self._tables if facts.is_unknown]:
            described = ". ".join(dict.fromkeys(facts.describe() for facts in unknown))
            raise ConfigError(
                f"{described}; their names do not say which is the question and which the answer. "
                f"Name them."
            )


def _split_names(text: str) -> tuple[str, ...]:
    """Return names separated by commas; a name with a comma in it is quoted, as in a CSV."""
    names = next(csv.reader([text], skipinitialspace=True), [])
    return tuple(name.strip() for name in names if name.strip())
