"""Every error a person can meet, each with the exit code that `nested-tune` returns for it.

A message is one paragraph: what is wrong, where, what was expected and what to do about it.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

from nested_core.text.foreign_text import escape_but_keep_newlines

if TYPE_CHECKING:
    from pydantic import ValidationError

NO_SPACE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def quote_path(path: object) -> str:
    """Return a path as a word of a shell's command, for a message that shows one."""
    return quote(str(path))


def shorten(value: object, characters: int = 40) -> str:
    """Format a value as one line of at most `characters` characters, for a message."""
    text = " ".join(str(value).split())
    return text if len(text) <= characters else text[: characters - 3] + "..."


def join_first_values(values: Sequence[object], count: int) -> str:
    """Join the first `count` values by commas, with "..." if there are more."""
    return ", ".join([*map(str, values[:count]), *(["..."] if len(values) > count else [])])


def list_first(texts: Iterable[str], count: int) -> list[str]:
    """Return the first `count` texts, and a text that counts the others."""
    listed = list(texts)
    more = len(listed) - count
    return [*listed[:count], f"and {more:,} more"] if more > 0 else listed


def describe_first_problem(error: ValidationError, name_of_whole: str = "the file") -> str:
    """Describe the first problem that pydantic found: `KEY: problem`.

    name_of_whole: stands for the key if the problem is about the whole value.
    """
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or name_of_whole}: {first['msg']}"


@dataclass(frozen=True)
class Advice:
    """What to do about an error, in a sentence for each kind of reader.

    command: at the command line.
    page: on a page of Prefect, which has buttons.
    python: in a notebook or a program.
    """

    command: str
    page: str
    python: str


def go_on_with(run_dir: Path | None = None) -> Advice:
    """Return the advice to resume a run; without `run_dir`, it names no folder."""
    folder = "its --run-dir and" if run_dir is None else f"--run-dir {quote_path(run_dir)}"
    path = "PATH" if run_dir is None else repr(str(run_dir))
    return Advice(
        command=f"Continue with the same command, {folder} --resume.",
        page="Continue with the Retry button.",
        python=f"Continue with finetune(config, open_run({path}, resume=True), resume=True).",
    )


JUDGE_AGAIN = Advice(
    command="Run the gate again with --resume.",
    page="Run the gate again with the Retry button.",
    python="Run the gate again with finetune(config, open_run(PATH, resume=True), resume=True).",
)
BEGIN_AGAIN = Advice(
    command="Begin again with the same command.",
    page="Begin again with the Retry button.",
    python="Begin again with the same call.",
)


class NestedTuneError(Exception):
    """Base of all errors of this project; `exit_code` is what the command line returns.

    message: text that is safe to show, even if it quotes names from files.
    advice: what to do, for the command line; in a traceback a note has it for Python.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, advice: Advice | None = None) -> None:
        """Create the error; the advice for Python becomes a note of its traceback."""
        super().__init__(message)
        self.advice = advice
        if advice is not None:
            self.add_note(f"In Python: {advice.python}")

    def describe_for(self, reader: Literal["command", "page", "python"]) -> str:
        """Return the message with the advice for this kind of reader."""
        message = super().__str__()
        if self.advice is not None:
            separator = "" if message.endswith("\n") else " "
            message += separator + getattr(self.advice, reader)
        return escape_but_keep_newlines(message)

    def __str__(self) -> str:
        """Return the message with the advice for the command line."""
        return self.describe_for("command")

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython displays for the error."""
        described = traceback.TracebackException.from_exception(self)
        frames = list(described.format())[: -len(list(described.format_exception_only()))]
        return [*frames, f"{type(self).__name__}: {self.describe_for('python')}"]


class ConfigError(NestedTuneError):
    """A command, a flag or a configuration that cannot be carried out as written."""

    exit_code = 2


@contextmanager
def naming_as_given(own: str, given: str) -> Iterator[None]:
    """Have a ConfigError of the block name what a person gave, and not a copy or link of ours."""
    try:
        yield
    except ConfigError as error:
        error.args = (str(error.args[0]).replace(own, given),)
        raise


class DatasetError(NestedTuneError):
    """A data set with at least one error; its dataset report has the findings."""

    exit_code = 3


class GateRejected(NestedTuneError):
    """An adapter that did not pass the gate; it is never retried and never registered.

    run: the RunDirectory that was judged; None if the adapter belongs to no run.
    verdict: the gate's Verdict, as in gate.json; None if there is no readable verdict.
    reasons: the verdict's reasons, each with `code`, `message`, `tensors` and `suite`.
    """

    exit_code = 4

    def __init__(
        self,
        message: str = "",
        *,
        advice: Advice | None = None,
        run: Any = None,
        verdict: Any = None,
    ) -> None:
        """Create the error, with the run and the verdict if they are known."""
        super().__init__(message, advice=advice)
        self.run = run
        self.verdict = verdict
        self.reasons: tuple[Any, ...] = () if verdict is None else verdict.reasons


class TrainingStopped(NestedTuneError):
    """Training that was asked to stop before its end and can be resumed from its checkpoint."""

    exit_code = 5


class DamagedError(NestedTuneError):
    """An adapter, a checkpoint or a registry on disk that is damaged or not safe to read."""

    exit_code = 6


class MissingFileError(DamagedError):
    """A file that belongs to an adapter, a checkpoint or a registry and is not there."""


@contextmanager
def naming_damaged_file(
    file: object, remedy: str = "", advice: Advice | None = None
) -> Iterator[None]:
    """Convert a pydantic ValidationError of the block to a DamagedError that names the file.

    remedy, advice: what to do, appended to the message.
    """
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        message = f"{file}: {describe_first_problem(error)}. {remedy}".rstrip()
        raise DamagedError(message, advice=advice) from error


class DirectoryInsteadOfFileError(DamagedError, IsADirectoryError):
    """A directory where a file has to be written; also an OSError, which a task may retry."""


class ChildFailed(NestedTuneError):
    """A child process that ended without the answer that it was started for."""


class CellEnded(ChildFailed):
    """A process that was ended at its limits, or by what it worked on: to try again is no use."""


class CellOutOfMemory(CellEnded):
    """A process that was ended because it held more memory than it may."""


class DataWorkerFailed(NestedTuneError):
    """A process that read or tokenized a part of a data set ended before it was done."""


class UpdateNotApplied(NestedTuneError):
    """A computed update that did not reach its parameter in the model."""


class TrainingDiverged(NestedTuneError):
    """Gradients that were not finite for more steps in a row than the configuration allows."""


class TrainingProcessesDiffer(NestedTuneError):
    """Data-parallel processes whose parameters are no longer equal."""


class TrainingProcessLost(NestedTuneError):
    """A data-parallel process that ended before training was done."""


class SilentUpdateWarning(UserWarning):
    """A warning during training that something which should have changed did not."""
