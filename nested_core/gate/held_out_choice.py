"""Which file of held-out examples `gate.held_out` stands for, as far as dataset.json can say it."""

from __future__ import annotations

from nested_core.config.gate import HELD_OUT_SPLITS
from nested_core.errors import ConfigError
from nested_core.storage.dataset_record import DatasetRecord


def held_out_file(choice: str, dataset: DatasetRecord) -> str | None:
    """The file that losses are measured on: `test.jsonl`, `valid.jsonl` or the file given.

    None where `auto` finds neither a test set nor a validation set.
    """
    splits = HELD_OUT_SPLITS.get(choice)
    if splits is None:
        return choice
    filled = [name for name in splits if name in dataset.splits and dataset.splits[name].rows]
    return f"{filled[0]}.jsonl" if filled else None


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
