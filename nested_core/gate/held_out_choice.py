"""Which file of held-out examples `gate.held_out` stands for, as far as dataset.json can say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.errors import ConfigError, DatasetError
from nested_core.storage.dataset_record import DatasetRecord


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
