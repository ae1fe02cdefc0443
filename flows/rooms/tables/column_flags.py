"""Which columns of a table are the question and the answer: named by flags, or asked for.

Each error says the command that works.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import glob
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.terminal.console import errors, print_progress
from nested_core.errors import ConfigError, DamagedError
from nested_core.storage.untrusted_files import read_regular
from nested_core.text.foreign_text import escape

if TYPE_CHECKING:
    from nested_core.rooms.tables.chats import Columns
    from nested_core.rooms.tables.data_set import Source
    from nested_core.rooms.tables.survey import FileFacts

TABLE_FLAGS = (
    *("prompt_feature", "template", "completion_feature", "completion_features"),
    *("system", "system_file", "suite"),
)
MAX_SYSTEM_BYTES = 2**20


def require_file(arguments: argparse.Namespace) -> None:
    """Name the file that was meant, where there is none of that name."""
    from nested_core.data.sources.split_files import SUFFIXES

    path = Path(arguments.data)
    if not arguments.data:
        raise ConfigError("--data is empty. Give a file, a folder or a hub's name: --data faq.csv")
    if "://" in arguments.data:
        raise ConfigError(
            f"--data: {arguments.data} is an address, and files are read here. To fetch it: "
            f"`curl -LO {shlex.quote(arguments.data)}`"
        )
    if not path.name.lower().endswith(SUFFIXES) or path.exists() or glob.glob(arguments.data):
        return
    there = [name.name for name in path.parent.glob("*") if name.name.lower().endswith(SUFFIXES)]
    near = difflib.get_close_matches(path.name, there, n=1)
    meant = (
        f" Did you mean: `{write_command(arguments, data=str(path.with_name(near[0])))}`"
        if near
        else ""
    )
    raise ConfigError(f"--data: there is no file {path}.{meant}")


def read_numbers(arguments: argparse.Namespace) -> None:
    """Read the numbers of --split and --suite in place; ConfigError with a command that works."""
    from nested_core.rooms.tables.dataset_split import read_share

    for name, read, example in (("split", read_share, 0.1), ("suite", _read_count, 5)):
        if (given := getattr(arguments, name)) is not None:
            try:
                setattr(arguments, name, read(given))
            except ConfigError as error:
                command = write_command(arguments, **{name: example})
                raise ConfigError(f"{error} For example: `{command}`") from None


def _read_count(given: str) -> int:
    try:
        return int(given)
    except ValueError:
        raise ConfigError(f"--suite {given}: expected a number of questions.") from None


def write_command(arguments: argparse.Namespace, **changes: Any) -> str:
    """The command line with other flags; a value of None leaves a flag out."""
    values = {**vars(arguments), **changes}
    words = ["nested-tune", "init", "--data", values["data"], "--model", values["model"]]
    for name in (*TABLE_FLAGS, "split", "minutes", "resume_adapter_file"):
        if (value := values[name]) is not None:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    if values["drop_fields"]:
        words += ["--drop-fields", *values["drop_fields"]]
    return shlex.join([*words, "-o", str(values["output"] or "lora.yaml")])


class ColumnFlags:
    """The flags for tables, and the command that works where one of them does not."""

    def __init__(self, arguments: argparse.Namespace, source: Source) -> None:
        from nested_core.rooms.tables.survey import guess_columns

        self._arguments = arguments
        self._files = list(source.facts.values())
        guessed = (guess_columns(facts.columns) for facts in self._files if facts.is_table)
        self._question, self._answer = next(filter(None, guessed), ("COLUMN", "ANOTHER"))

    def command(self, **changes: Any) -> str:
        """The command line with other flags; a value of None leaves a flag out."""
        return write_command(self._arguments, **changes)

    def command_by_guess(self) -> str:
        """The command line with the columns that look most like a question and an answer."""
        none = dict.fromkeys(("template", "completion_features"))
        return self.command(prompt_feature=self._question, completion_feature=self._answer, **none)

    def read_columns(self) -> Columns | None:
        """The columns that are named; None where none is."""
        from nested_core.rooms.tables.chats import Columns, Template

        given = self._arguments
        self._refuse_both("prompt_feature", "template")
        self._refuse_both("completion_feature", "completion_features")
        has_question = given.prompt_feature is not None or given.template is not None
        answer = given.completion_feature or given.completion_features
        if not has_question and answer is None:
            return None
        if not has_question or answer is None:
            needs = "--completion-feature" if has_question else "--prompt-feature or --template"
            raise ConfigError(
                f"A row is learnt as a question and its answer, so {needs} is needed too. For "
                f"example: `{self.command_by_guess()}`"
            )
        try:
            question = (
                Template(("", given.prompt_feature, ""))
                if given.template is None
                else Template.parse(given.template)
            )
        except ConfigError as error:
            raise ConfigError(f"{error} For example: `{self.command_by_guess()}`") from None
        is_object = given.completion_feature is None
        answers = _split_names(answer) if is_object else (answer,)
        if not answers:
            raise ConfigError(
                f"--completion-features: {answer!r} names no column. For example: "
                f"`{self.command_by_guess()}`"
            )
        if dropped := [name for name in answers if name in given.drop_fields]:
            raise ConfigError(
                f"--drop-fields leaves out {dropped[0]!r}, which is the answer. Leave that flag "
                f"out: `{self.command(drop_fields=())}`"
            )
        if repeated := [name for name in answers if answers.count(name) > 1]:
            once = ",".join(dict.fromkeys(answers))
            raise ConfigError(
                f"--completion-features: {repeated[0]!r} is named twice. Name each column once: "
                f"`{self.command(completion_features=once)}`"
            )
        if answers == question.columns:
            raise ConfigError(
                f"The question and the answer are both the column {answers[0]!r}, so there is "
                f"nothing to learn. Name two columns, for example: `{self.command_by_guess()}`"
            )
        return Columns(question, answers, is_object)

    def _refuse_both(self, one: str, other: str) -> None:
        given = vars(self._arguments)
        if given[one] is not None and given[other] is not None:
            flags = [f"--{name.replace('_', '-')}" for name in (one, other)]
            raise ConfigError(
                f"{flags[0]} and {flags[1]} say the same thing twice. Give one of them: "
                f"`{self.command(**{one: None})}`"
            )

    def read_system(self) -> str | None:
        """The system text that is given; None where none is."""
        self._refuse_both("system", "system_file")
        given, file = self._arguments.system, self._arguments.system_file
        if file is None:
            return None if given is None else str(given)
        command = self.command(system_file=None, system="You are ...")
        try:
            text = read_regular(file, MAX_SYSTEM_BYTES, follow_links=True).decode("utf-8-sig")
        except (DamagedError, OSError) as error:
            raise ConfigError(
                f"--system-file: {error} Give a text file, or the text itself: `{command}`"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"--system-file: {file} is not UTF-8: {error.reason}. Save it as UTF-8, or give "
                f"the text itself: `{command}`"
            ) from error
        if not text.strip():
            raise ConfigError(
                f"--system-file: {file} has no text in it. Write the text into it, or give the "
                f"text itself: `{command}`"
            )
        return text.rstrip("\r\n")

    def require_columns(self, columns: Columns) -> None:
        """Refuse a column that a table does not have, with the command that works."""
        complete = [f for f in self._files if f.columns.keys() >= set(columns.names)]
        others = [f for f in self._files if f.is_table and f not in complete]
        if not others and complete:
            return
        facts = (others or self._files)[0]
        missing = [name for name in columns.names if name not in facts.columns]
        told = f"{facts.name} has no column {' and no column '.join(map(repr, missing))}"
        if complete:
            name = complete[0].name
            raise ConfigError(
                f"{told}, as {name} has. {_list_columns(facts)}. The files of a data set need the "
                f"same columns: rename them there, or train on one file: "
                f"`{self.command(data=_find_path(self._arguments.data, name))}`"
            )
        changes: dict[str, Any] = {}
        nearest = [_find_near(name, facts.columns) for name in missing]
        for name, near in zip(missing, nearest, strict=True):
            changes |= self._rename(name, near, columns)
        meant = " and ".join(map(repr, filter(None, nearest)))
        told += f"; did you mean {meant}?" if meant else "."
        if all(any(name in about.values for about in facts.columns.values()) for name in missing):
            raise ConfigError(
                f"{told} A row below the first one has these names: delete the rows above it."
            )
        if len(facts.columns) == 1:
            raise ConfigError(
                f"{told} Its one column is {next(iter(facts.columns))}. If that is several, they "
                f"are not separated by commas, semicolons, tabs or bars: save the table as CSV "
                f"UTF-8, and give that file to --data."
            )
        raise ConfigError(
            f"{told} {_list_columns(facts)}. For example: `{self.command(**changes)}`"
        )

    def _rename(self, name: str, near: str | None, columns: Columns) -> dict[str, Any]:
        """The flags with a column that is there in the place of one that is not."""
        given = self._arguments
        is_answer = name in columns.answer
        new = near or (self._answer if is_answer else self._question)
        if name == given.prompt_feature:
            return {"prompt_feature": new}
        if is_answer and not columns.is_object:
            return {"completion_feature": new}
        if is_answer and near:
            names = [near if answer == name else answer for answer in columns.answer]
            return {"completion_features": ",".join(names)}
        if is_answer:
            return {"completion_features": None, "completion_feature": new}
        if near:
            return {"template": given.template.replace(f"{{{name}}}", f"{{{near}}}")}
        return {"template": None, "prompt_feature": new}


def ask_or_refuse(
    flags: ColumnFlags, source: Source, system: str | None
) -> tuple[Columns, str | None]:
    """Ask for the columns in a terminal; else ConfigError with the command that names them."""
    facts, *more = source.unknown_files
    if sys.stdin.isatty() and sys.stderr.isatty():
        return _ask(flags, facts, system)
    others = [other for other in more if other.columns.keys() != facts.columns.keys()]
    raise ConfigError(
        f"{'. '.join(map(_list_columns, [facts, *others]))}; their names do not say which is the "
        f"question and which the answer. Name them, for example: `{flags.command_by_guess()}`. In "
        f"a terminal, init asks for them."
    )


def _ask(flags: ColumnFlags, facts: FileFacts, system: str | None) -> tuple[Columns, str | None]:
    """Ask for question, answer and system text; Enter takes what is in brackets."""
    from nested_core.rooms.tables.chats import Columns, Template
    from nested_core.rooms.tables.survey import guess_columns

    names = list(facts.columns)
    guessed = guess_columns(facts.columns) or (names[0], names[-1])
    print_progress(f"{facts.name} has {len(names)} columns:")
    width = min(24, max(map(len, names)))
    for number, name in enumerate(names, 1):
        print_progress(f"{number:>4}  {name:<{width}}  {facts.columns[name].describe()}")
    try:
        asked = "Which is the question? Several, with commas, become lines of it"
        question = _ask_for_names(asked, names, guessed[0])
        asked = "Which is the answer? Several, with commas, become a JSON object"
        answer = _ask_for_names(asked, names, guessed[1])
        if system is None:
            system = input("System text, which says what the model is for [none]: ").strip()
    except EOFError:
        raise ConfigError(
            f"Nothing was answered. Name the columns instead: `{flags.command_by_guess()}`"
        ) from None
    is_object = len(answer) > 1
    given = {"completion_features" if is_object else "completion_feature": ",".join(answer)}
    template = Template(("", question[0], ""))
    if len(question) == 1:
        given["prompt_feature"] = question[0]
    else:
        given["template"] = r"\n".join(f"{name}: {{{name}}}" for name in question)
        template = Template.parse(given["template"])
    print_progress("The same without questions:")
    command = flags.command(system=system or None, **given)
    errors.print(escape(command), soft_wrap=True)  # to be copied: no line is broken in it
    return Columns(template, answer, is_object), system


def _ask_for_names(asked: str, names: Sequence[str], default: str) -> tuple[str, ...]:
    """Ask until the answer is one or more columns."""
    while True:
        typed = input(f"{asked} [{default}]: ").strip()
        if not typed:
            return (default,)
        given = (typed,) if typed in names else _split_names(typed)
        found = [
            names[int(word) - 1] if word.isdecimal() and 0 < int(word) <= len(names) else word
            for word in given
        ]
        strange = [word for word in found if word not in names]
        if found and not strange:
            return tuple(dict.fromkeys(found))
        problem = f"there is no column {strange[0]}" if strange else "no column is named"
        print_progress(f"{problem}; expected numbers from 1 to {len(names)}, or names.")


def _split_names(text: str) -> tuple[str, ...]:
    """Names separated by commas; one with a comma in it is quoted, as in a CSV."""
    names = next(csv.reader([text], skipinitialspace=True), [])
    return tuple(name.strip() for name in names if name.strip())


def _find_near(name: str, columns: Mapping[str, Any]) -> str | None:
    """The column that was meant: the same but for case and white space, or a similar one."""
    by_folded = {column.strip().casefold(): column for column in columns}
    near = difflib.get_close_matches(name.strip().casefold(), by_folded, n=1, cutoff=0.7)
    return by_folded[near[0]] if near else None


def _list_columns(facts: FileFacts) -> str:
    """All columns of a file, such as `faq.csv has the columns A, B`."""
    return f"{facts.name} has the columns {', '.join(facts.columns)}"


def _find_path(data: str, name: str) -> str:
    """The path of one of the files of a folder or of a pattern."""
    folder = Path(data) if Path(data).is_dir() else Path(data).parent
    return str(folder / name) if (folder / name).is_file() else name
