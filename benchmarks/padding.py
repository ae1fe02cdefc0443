"""The share of a batch that is padding, over an epoch of skewed lengths, against mlx-lm's batching.

Lengths are log-normal, as those of instruction data sets are: half of the examples below some 200
tokens, one in twenty above 880, cut at 2,048. Both draw the same examples in batches of 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import iterate_batches

from benchmarks.timing import keep
from nested_core.data.batches import BatchOrder

ROWS = (2_000, 20_000)
BATCH_SIZE, MAX_SEQ_LENGTH, SEED = 8, 2048, 0
MEDIAN, SPREAD = 200, 0.9


@dataclass(frozen=True)
class Padding:
    """What share of all input positions of an epoch is padding, and how many shapes there were."""

    share: float
    shapes: int


def skewed_lengths(rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of each example, int64 [rows], the same every time."""
    drawn = np.random.default_rng(SEED).lognormal(np.log(MEDIAN), SPREAD, rows)
    return drawn.clip(8, MAX_SEQ_LENGTH).astype(np.int64)


class _Examples:
    """A data set as mlx_lm.lora hands it to CacheDataset: rows are JSON objects until asked for."""

    def __init__(self, lengths: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"messages": int(self._lengths[index])}

    def process(self, row: dict[str, int]) -> tuple[list[int], int]:
        """Tokens and mask offset of a row."""
        return [1] * row["messages"], 0


def ours(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> Padding:
    """Every batch of the first epoch of our plan."""
    plan = BatchOrder(lengths, BATCH_SIZE, SEED, max_seq_length=MAX_SEQ_LENGTH)
    batches = [plan.batch(index) for index in range(plan.batches_per_epoch)]
    tokens = sum(int((lengths[batch.rows] - 1).sum()) for batch in batches)
    return _share(tokens, [batch.width for batch in batches])


def theirs(dataset: Any) -> Padding:
    """Every batch of an epoch of mlx_lm.tuner.trainer.iterate_batches, which drops a remainder."""
    tokens, widths = 0, []
    batches: Iterator[Any] = iterate_batches(dataset, BATCH_SIZE, MAX_SEQ_LENGTH, seed=SEED)
    for batch, bounds in batches:
        tokens += int((bounds[:, 1] - 1).sum())
        widths.append(batch.shape[1] - 1)
    return _share(tokens, widths)


def _share(tokens: int, widths: list[int]) -> Padding:
    return Padding(1 - tokens / (BATCH_SIZE * sum(widths)), len(set(widths)))


def main() -> None:
    """Print the shares and keep them as JSON."""
    found: dict[int, dict[str, Any]] = {}
    for rows in ROWS:
        lengths = skewed_lengths(rows)
        sorted_by_length = [([1] * int(length), 0) for length in lengths]
        arms = {
            "nested-tune": ours(lengths),
            "mlx_lm.lora": theirs(CacheDataset(_Examples(lengths))),
            "mlx-lm's batches, if its sort saw the lengths": theirs(sorted_by_length),
        }
        for name, padding in arms.items():
            print(f"{rows:,} rows: {name}: {padding.share:.2%} padding, {padding.shapes} shapes")
        found[rows] = {name: vars(padding) for name, padding in arms.items()}
    keep("padding", {"batch_size": BATCH_SIZE, "rows": found})


if __name__ == "__main__":
    main()
