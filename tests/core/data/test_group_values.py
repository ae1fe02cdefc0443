"""data_policy.group: the values of a field of the rows, by which held-out rows are one draw."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from nested_core.config.sections import DataPolicy
from nested_core.data.data_settings import DataSettings
from nested_core.data.held_out_rows import group_key, read_group_values
from nested_core.errors import DatasetError
from tests.builders.data_sets import chat, write_lines
from tests.example import example_config, prepare
from tests.left_out import needs_rooms


def settings_for(folder: Path, group: str) -> DataSettings:
    return DataSettings(data=str(folder), policy=DataPolicy(group=group))


ROWS = [
    {"text": "a", "document": 7},
    {"text": "b"},
    {"text": "c", "document": 7},
    {"text": "d", "document": "7"},
]


@pytest.mark.parametrize(
    "name", ["valid.jsonl", pytest.param("valid.json", marks=needs_rooms("tables"))]
)
def test_equal_values_are_one_group_and_a_row_without_the_field_has_none(tmp_path, name) -> None:
    write_lines(tmp_path / name, [ROWS] if name == "valid.json" else ROWS)
    values = read_group_values(settings_for(tmp_path, "document"), "valid", [1, 2, 3, 4])
    assert values == ["7", None, "7", "7"]
    assert read_group_values(settings_for(tmp_path, "document"), "valid", [2, 3]) == [None, "7"]


def test_an_id_is_one_group_as_a_number_and_as_a_text() -> None:
    assert {group_key(one) for one in (27, 27.0, "27", " 27 ", "27.0")} == {"27"}
    assert group_key(1e17) == group_key(10**17) == str(10**17)
    others = [group_key(one) for one in (2.5, "v1.0", "007", "1.10", True, [1], None, " ")]
    assert others == ["2.5", "v1.0", "007", "1.10", "true", "[1]", None, None]


def test_a_field_that_no_row_has_is_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "valid.jsonl", ROWS)
    with pytest.raises(DatasetError, match=r"no row of valid\.jsonl has a field 'doc'"):
        read_group_values(settings_for(tmp_path, "doc"), "valid", [1, 2])


@pytest.mark.parametrize(
    ("shared", "expected"), [(0, None), (2, "2 of 4 held-out rows share their thread with rows")]
)
def test_a_group_in_train_and_in_held_out_rows_is_told_before_training(
    shared: int, expected: str | None, tmp_path: Path
) -> None:
    threads = {"train": range(8), "valid": range(8 - shared, 12 - shared)}
    for split, numbers in threads.items():
        # As a table and as pandas has them, where the other split has numbers
        ids = [n if split == "train" else (str(n), float(n))[n % 2] for n in numbers]
        rows = [chat(f"What is {n}?", f"{n} in {split}.") | {"thread": n} for n in ids]
        write_lines(tmp_path / "data" / f"{split}.jsonl", rows)
    config = example_config(data=str(tmp_path / "data"), data_policy={"group": "thread"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        prepare(config, tmp_path / "run")
    told = [str(one.message) for one in caught if "held-out rows share" in str(one.message)]
    assert len(told) == (expected is not None)
    assert all(expected is not None and expected in one for one in told)
