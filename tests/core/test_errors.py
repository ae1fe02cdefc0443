"""The errors that a person can meet: the exit code of each, and how lists of values are shown."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from nested_core import errors
from nested_core.errors import (
    BEGIN_AGAIN,
    JUDGE_AGAIN,
    Advice,
    DirectoryInsteadOfFileError,
    NestedTuneError,
    TrainingStopped,
    go_on_with,
    join_first_values,
)

EXIT_CODES = {
    "NestedTuneError": 1,
    "ConfigError": 2,
    "DatasetError": 3,
    "GateRejected": 4,
    "TrainingStopped": 5,
    "DamagedError": 6,
    "MissingFileError": 6,
    "DirectoryInsteadOfFileError": 6,
}


def test_each_error_has_the_exit_code_that_the_commands_promise() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    ours = {kind.__name__: kind.exit_code for kind in kinds if issubclass(kind, NestedTuneError)}
    assert ours == {name: EXIT_CODES.get(name, 1) for name in ours}
    assert set(EXIT_CODES) <= set(ours)


@pytest.mark.parametrize(
    ("count", "shown"), [(1, "1, ..."), (2, "1, 2, ..."), (3, "1, 2, 3"), (4, "1, 2, 3")]
)
def test_the_first_values_end_in_dots_where_there_are_more(count: int, shown: str) -> None:
    assert join_first_values([1, 2, 3], count) == shown


@pytest.mark.parametrize("advice", [BEGIN_AGAIN, JUDGE_AGAIN, go_on_with(), go_on_with(Path("r"))])
def test_advice_is_in_the_words_of_who_reads_it(advice: Advice) -> None:
    error = TrainingStopped("It was stopped.", advice=advice)
    assert str(error) == f"It was stopped. {advice.command}"
    page = error.describe_for("page")
    assert page.startswith("It was stopped. ")
    assert "Retry button" in page
    assert [word for word in ("--", "open_run", "command") if word in page] == []
    python = error.describe_for("python")
    assert "--" not in python
    assert "Retry" not in python


def test_a_folder_to_go_on_with_is_named_to_who_can_give_it() -> None:
    error = TrainingStopped("It was stopped.", advice=go_on_with(Path("runs/a b")))
    assert "--run-dir 'runs/a b' --resume" in str(error)
    assert "open_run('runs/a b', resume=True)" in error.describe_for("python")


def test_a_notebook_is_shown_the_words_of_python_below_the_frames() -> None:
    with pytest.raises(TrainingStopped) as raised:
        raise TrainingStopped("It was stopped.", advice=BEGIN_AGAIN)
    first, *_, last = raised.value._render_traceback_()
    assert first.startswith("Traceback")
    assert last == f"TrainingStopped: It was stopped. {BEGIN_AGAIN.python}"


def test_an_error_keeps_its_advice_from_process_to_process() -> None:
    error = TrainingStopped("It was stopped.", advice=BEGIN_AGAIN)
    assert str(copy.copy(error)) == str(error)
    assert str(DirectoryInsteadOfFileError("a folder")) == "a folder"
