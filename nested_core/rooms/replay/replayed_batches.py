"""The order of batches in which some rows are replayed.

An epoch has each new row once, and as many replayed rows as make up their fraction. They are
batched by length as one data set is, and within a width they are spread evenly. Like BatchOrder it
is stateless: a batch follows from lengths, seed and index alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nested_core.data.batches import BatchOrder, BatchRows
from nested_core.data.tokens.tokenized_split import Bool, Int32, Int64, TokenizedSplit
from nested_core.rooms.replay.replay_draws import Weighting, draw_rows


def count_replayed(rows: int, fraction: float) -> int:
    """Return how many rows are replayed beside so many new ones, to be a fraction of all."""
    return max(1, round(rows * fraction / (1 - fraction))) if fraction else 0


@dataclass(frozen=True, eq=False)
class ReplayedRows:
    """The rows that may be replayed, and how.

    lengths: tokens of each row, int64 [n].
    sources: the age of each row's source, 0 for the newest, ascending, int64 [n].
    rows: how many rows each source had before rows were chosen.
    fraction: of all rows of an epoch.
    """

    lengths: Int64
    sources: Int64
    rows: tuple[int, ...]
    weighting: Weighting
    fraction: float


@dataclass(frozen=True, eq=False)
class JoinedSplits:
    """New and replayed examples under one numbering: the new ones first."""

    new: TokenizedSplit
    replayed: TokenizedSplit

    def example(self, index: int) -> Int32:
        """Return the tokens of one example, int32 [length], as a view."""
        split, row = self._find(index)
        return split.example(row)

    def example_mask(self, index: int) -> Bool:
        """Return the target mask of one example, bool [length], as a view."""
        split, row = self._find(index)
        return split.example_mask(row)

    def _find(self, index: int) -> tuple[TokenizedSplit, int]:
        later = index - len(self.new)
        return (self.new, index) if later < 0 else (self.replayed, later)

    def count_supervised(self) -> Int64:
        """Count the tokens of each example that the loss counts, int64 [n]."""
        return np.concatenate([self.new.count_supervised(), self.replayed.count_supervised()])

    def release_pages(self) -> None:
        """Release the memory pages of the mapped files, so that none stay in this process."""
        self.new.release_pages()
        self.replayed.release_pages()


class ReplayedBatchOrder(BatchOrder):
    """The batches of a run with replay; rows from number `len(lengths)` on are replayed ones."""

    def __init__(
        self,
        lengths: Int64,
        replay: ReplayedRows,
        batch_size: int,
        seed: int,
        *,
        max_seq_length: int,
    ) -> None:
        """Choose the widths of batches by the lengths of all rows, new and replayed.

        lengths: of the new rows, int64 [n].
        replay: the rows that are replayed.
        """
        together = np.concatenate([lengths, replay.lengths])
        super().__init__(together, batch_size, seed, max_seq_length=max_seq_length)
        self._replay = replay
        self._new = len(lengths)
        self._replayed = count_replayed(self._new, replay.fraction)  # in an epoch
        self._widths = self.buckets.widths[::-1]
        needed = (together - 1).clip(max=self._widths[-1])
        self._width_numbers = np.searchsorted(self._widths, needed)  # of each row, in `_widths`
        self._drawn = np.zeros(0, np.int32)

    @property
    def batches_per_epoch(self) -> int:
        """How many batches use each new row once."""
        return -(-(self._new + self._replayed) // self.batch_size)

    def batch(self, index: int) -> BatchRows:
        """Return the batch with this index, from 0; it is the same in every process."""
        epoch, position = divmod(index, self.batches_per_epoch)
        rows, order = self._epoch(epoch)
        start = int(order[position]) * self.batch_size
        own = rows[start : start + self.batch_size]
        return BatchRows(own, int(self._widths[self._width_numbers[own].max()]))

    def sum_replayed(self, values: Int64, batches: int) -> int:
        """Sum a value a row over the replayed rows of the first so many batches.

        values: int64 [n], one for each row, new ones too.
        """
        epoch, position = divmod(batches, self.batches_per_epoch)
        begun = range(batches - position, batches)
        rows = [self._draw(epoch * self._replayed), *(self.batch(n).rows for n in begun)]
        used = np.concatenate(rows)
        return int(values[used[used >= self._new]].sum())

    def largest_sums(self, values: Int64, rank: int = 0, ranks: int = 1) -> dict[int, int]:
        """Return for each width the largest sum of the rows' values in a batch of epoch 0.

        The arguments are those of `BatchOrder.largest_sums`.
        """
        largest: dict[int, int] = {}
        for batch in map(self.batch, range(self.batches_per_epoch)):
            total = int(values[batch.rows[rank::ranks]].sum())
            largest[batch.width] = max(total, largest.get(batch.width, 0))
        return largest

    def _draw(self, count: int) -> Int32:
        """Return the first replayed rows; more than were asked for are kept."""
        if count > len(self._drawn):
            replay = self._replay
            drawn = draw_rows(replay.sources, replay.rows, 2 * count, replay.weighting, self.seed)
            self._drawn = drawn + np.int32(self._new)
        return self._drawn[:count]

    def _shuffle_epoch(self, epoch: int) -> tuple[Int32, Int32]:
        """Return an epoch's rows by width, the widest first, and the order of its batches.

        Both are int32: indices of rows (new ones, then replayed ones), and of batches of rows.
        """
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        first, end = epoch * self._replayed, (epoch + 1) * self._replayed
        parts = [
            generator.permutation(np.arange(self._new, dtype=np.int32)),
            self._draw(end)[first:],
        ]
        places = np.concatenate([_spread(self._width_numbers[rows]) for rows in parts])
        rows = np.concatenate(parts)
        rows = rows[np.lexsort((places, -self._width_numbers[rows]))]
        return rows, generator.permutation(np.arange(self.batches_per_epoch, dtype=np.int32))


def _spread(groups: Int64) -> npt.NDArray[np.float64]:
    """Return places between 0 and 1, evenly spaced within each group, float64 [n].

    groups: the group that each item belongs to, int64 [n].
    """
    counts = np.bincount(groups)
    order = np.argsort(groups, kind="stable")
    numbers = np.arange(len(groups)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.empty(len(groups))
    places[order] = (numbers + 0.5) / np.repeat(counts, counts)
    return places
