"""The errors that a person can meet: the exit code of each, and how lists of values are shown."""

from __future__ import annotations

import pytest

from nested_core import errors
from nested_core.errors import NestedTuneError, join_first_values

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
