"""Every error a person can meet, each with the exit code that `nested-tune` returns for it.

A message is one paragraph: what is wrong, where, what was expected and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nested_core.text.foreign_text import escape_but_keep_newlines

if TYPE_CHECKING:
    from pydantic import ValidationError


def shorten(value: object, characters: int = 40) -> str:
    """The value as text on one line of at most so many characters, for use in a message."""
    text = " ".join(str(value).split())
    return text if len(text) <= characters else text[: characters - 3] + "..."


def join_first_values(values: Sequence[object], count: int) -> str:
    """The first `count` values separated by commas, then "..." if there are more."""
    return ", ".join([*map(str, values[:count]), *(["..."] if len(values) > count else [])])


def describe_first_problem(error: ValidationError, name_of_whole: str = "the file") -> str:
    """The first problem that pydantic found: `KEY: problem`, or `name_of_whole` for the key."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or name_of_whole}: {first['msg']}"


class NestedTuneError(Exception):
    """Base of all errors of this project; `exit_code` is what the command line returns.

    A message names files, keys and tensors that others named: as text it is safe to show.
    """

    exit_code = 1

    def __str__(self) -> str:
        return escape_but_keep_newlines(super().__str__())


class ConfigError(NestedTuneError):
    """A command, a flag or a configuration that cannot be carried out as written."""

    exit_code = 2


class DatasetError(NestedTuneError):
    """A data set with at least one error; the findings are in its dataset report."""

    exit_code = 3


class GateRejected(NestedTuneError):
    """An adapter that did not pass the gate; it is never retried and never registered."""

    exit_code = 4


class TrainingStopped(NestedTuneError):
    """Training that was asked to stop before its end and can be resumed from its checkpoint."""

    exit_code = 5


class DamagedError(NestedTuneError):
    """An adapter, a checkpoint or a registry on disk that is damaged or not safe to read."""

    exit_code = 6


class MissingFileError(DamagedError):
    """A file that belongs to an adapter, a checkpoint or a registry and is not there."""


class DirectoryInsteadOfFileError(DamagedError, IsADirectoryError):
    """A directory where a file has to be written: damage, and an I/O error that may pass."""


class DataWorkerFailed(NestedTuneError):
    """A process that read or tokenised a part of a data set ended before it was done."""


class UpdateNotApplied(NestedTuneError):
    """A computed update that did not reach the parameter it was computed for."""


class TrainingDiverged(NestedTuneError):
    """Gradients that stayed non-finite for more steps in a row than the configuration allows."""


class TrainingProcessesDiffer(NestedTuneError):
    """Processes that train one adapter together and no longer hold the same numbers."""


class TrainingProcessLost(NestedTuneError):
    """A process among those that train together that ended before training was done."""


class SilentUpdateWarning(UserWarning):
    """A red flag raised while training runs: something that should have moved did not."""
