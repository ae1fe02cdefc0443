"""What other steps of a run need of dataset.json: the digests of the data, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter, ValidationError

from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.errors import (
    ConfigError,
    DamagedError,
    DatasetError,
    describe_first_problem,
    go_on_with,
)
from nested_core.storage.strict_files import read_json


@dataclass(frozen=True)
class SplitRecord:
    """One split: the digest of its examples, and how many there are."""

    digest: str
    rows: int = 0


@dataclass(frozen=True)
class DatasetRecord:
    """The digest of the whole data set, and the splits that it has."""

    digest: str
    splits: dict[str, SplitRecord]


_RECORD_VALIDATOR = TypeAdapter(DatasetRecord)


def read_dataset_record(path: Path) -> DatasetRecord:
    """Read dataset.json; DamagedError if it is not the report on a data set."""
    document = read_json(path, None)  # as large as the number of findings made it
    try:
        return _RECORD_VALIDATOR.validate_python(document, strict=False)
    except ValidationError as error:
        raise DamagedError(
            f"{path} is not the report on a data set ({describe_first_problem(error)}). It is "
            f"written anew where the run goes on.",
            advice=go_on_with(),
        ) from error


class CountedSplit(Protocol):
    """A split of the data set, of which it is known how many examples it has."""

    @property
    def rows(self) -> int:
        """The number of examples."""


def held_out_split(choice: str, splits: Mapping[str, CountedSplit]) -> str | None:
    """The split that losses are measured on: the first one with examples that the choice allows.

    None where there is none, and where the choice is a file outside of the data set.
    """
    allowed = SPLITS_BY_HELD_OUT_CHOICE.get(choice, ())
    return next((name for name in allowed if name in splits and splits[name].rows), None)


def held_out_file(choice: str, dataset: DatasetRecord) -> str | None:
    """The file that losses are measured on: `test.jsonl`, `valid.jsonl` or the file given.

    None where `auto` finds neither a test set nor a validation set.
    """
    if choice not in SPLITS_BY_HELD_OUT_CHOICE:
        return choice
    split = held_out_split(choice, dataset.splits)
    return None if split is None else f"{split}.jsonl"


def require_held_out(choice: str, max_kl: float | None, dataset: DatasetRecord, data: str) -> None:
    """Raise ConfigError if the chosen split is not there, or a bound has nothing to hold against.

    data: where the data set comes from, for the message.
    """
    if held_out_file(choice, dataset) is not None:
        return
    if choice != "auto":
        raise ConfigError(
            f"gate.held_out: {data} has no {choice}.jsonl, or it is empty. Give the name of a "
            f"split that it has, a JSON Lines file, or auto."
        )
    if max_kl is not None:
        raise ConfigError(
            f"gate.max_kl: {data} has neither test.jsonl nor valid.jsonl, on which to measure how "
            f"far predictions move. Add one, or name a file by gate.held_out."
        )


def require_test_set(dataset: DatasetRecord, data: str) -> None:
    """Raise DatasetError if there is no test set, which `test` asks to be measured on."""
    if "test" not in dataset.splits or not dataset.splits["test"].rows:
        raise DatasetError(
            f"test: {data} has no test.jsonl, or it is empty. Add one, or leave out test: true."
        )
