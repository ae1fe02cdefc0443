"""Which replayed row comes when, and the order of batches in which some rows are replayed.

An epoch has each new row once, and as many replayed rows as make up their fraction. They are
batched by length as one data set is, and within a width they are spread evenly. Like BatchOrder it
is stateless: a batch follows from lengths, seed and index alone.

Of the replayed rows, under `uniform` all are one group, which is gone through again and again, in
another order each time. Under `recent` each source is a group, and each of its rows comes half as
often as a row of the next newer source: of a source of age a (0 is the newest) with n rows, the
share of the draws is n / 2^a, over the sum of that. Groups take turns by the golden-ratio sequence,
so that after any number of draws each has its share to within a few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from nested_core.data.batches import BatchOrder, BatchRows
from nested_core.data.tokens.tokenized_split import Bool, Int32, Int64, TokenizedSplit

Weighting = Literal["uniform", "recent"]
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_CHOICE = 2**62  # in place of an epoch, for the permutation that chooses rows


def choose_rows(rows: Sequence[int], draws: int, weighting: Weighting, seed: int) -> list[Int64]:
    """Return the rows of each source that a run replays, ascending, as numbers within the source.

    As many rows of a group are chosen, at random, as the group has draws, or all of them.

    Args:
        rows: the number of rows of each source, by age.
        draws: the number of rows that the run mixes in; a row that comes twice counts twice.
        weighting: how draws are shared between the sources, see the module.
        seed: the run's seed.
    """
    sources = np.repeat(np.arange(len(rows)), rows)
    drawn = draw_rows(sources, rows, draws, weighting, seed, first=_CHOICE)
    chosen = np.bincount(drawn, minlength=len(sources)) > 0
    return [np.flatnonzero(own) for own in np.split(chosen, np.cumsum(rows))[:-1]]


def draw_rows(
    sources: Int64,
    rows: Sequence[int],
    draws: int,
    weighting: Weighting,
    seed: int,
    *,
    first: int = 0,
) -> Int32:
    """Return the index of the row that comes at each draw, int32 [draws]; of no rows none.

    A group's rows come in a random order, and in another one each time that all have come.

    The arguments are those of `choose_rows`.

    sources: the age of the source of each row that was chosen, 0 for the newest, ascending.
    first: the number of the first of these orders.
    """
    groups = sources if weighting == "recent" else np.zeros_like(sources)
    shares = _share_draws(rows, weighting)
    shares[np.bincount(groups, minlength=len(shares)) == 0] = 0.0  # none could be tokenised
    turns = _take_turns(shares, draws)
    drawn = np.zeros(len(turns), np.int32)
    for group in np.unique(groups):
        members, draws_of_group = np.flatnonzero(groups == group), np.flatnonzero(turns == group)
        rounds = range(first, first - (-len(draws_of_group) // len(members)))  # rounded up
        order = [np.zeros(0, np.int64), *(_permute(members, seed, epoch) for epoch in rounds)]
        drawn[draws_of_group] = np.concatenate(order)[: len(draws_of_group)]
    return drawn


def _share_draws(rows: Sequence[int], weighting: Weighting) -> npt.NDArray[np.float64]:
    """Return the weight of each group."""
    sizes = np.asarray(rows, np.float64)
    if weighting == "uniform":
        return np.array([sizes.sum()])
    weights: npt.NDArray[np.float64] = sizes * 0.5 ** np.arange(len(sizes))
    return weights


def _take_turns(shares: npt.NDArray[np.float64], draws: int) -> Int64:
    """Return the group of each draw, int64 [draws]; none if no group has any share."""
    if not shares.sum():
        return np.zeros(0, np.int64)
    places = (np.arange(draws) + 0.5) * _GOLDEN_RATIO % 1.0
    ends = np.cumsum(shares) / shares.sum()
    turns: Int64 = np.searchsorted(ends[:-1], places, "right")
    return turns


def _permute(rows: Int64, seed: int, epoch: int) -> Int64:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)


def count_replayed(rows: int, fraction: float) -> int:
    """Return how many rows are replayed beside so many new ones, to be a fraction of all."""
    return max(1, round(rows * fraction / (1 - fraction))) if fraction else 0


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
        new: Int64,
        replayed: Int64,
        fraction: float,
        draw: Callable[[int], Int32],
        *,
        batch_size: int,
        seed: int,
        max_seq_length: int,
    ) -> None:
        """Choose the widths of batches by the lengths of all rows, new and replayed.

        new, replayed: tokens of each row, int64 [n].
        fraction: of replayed rows among all rows of an epoch.
        draw: returns the replayed row that comes at each of so many draws, int32.
        """
        together = np.concatenate([new, replayed])
        super().__init__(together, batch_size, seed, max_seq_length=max_seq_length)
        self._draw_anew = draw
        self._new = len(new)
        self._replayed = count_replayed(self._new, fraction)  # in an epoch
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
            self._drawn = self._draw_anew(2 * count) + np.int32(self._new)
        return self._drawn[:count]

    def _shuffle_epoch(self, epoch: int) -> tuple[Int32, Int32]:
        """Return an epoch's rows by width, the widest first, and the order of its batches.

        Both are int32: indices of rows (new ones, then replayed ones), and of batches of rows.
        """
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        first, end = epoch * self._replayed, (epoch + 1) * self._replayed
        new = generator.permutation(np.arange(self._new, dtype=np.int32))
        parts = [new, self._draw(end)[first:]]
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
