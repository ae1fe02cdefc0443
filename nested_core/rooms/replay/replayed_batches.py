"""The order of batches in which some rows are replayed.

Batch s, from 0, has floor((s + 1) B f) - floor(s B f) replayed rows among its B, f being the
fraction; the others are new, each once an epoch, with examples of about their length. The rows that
are replayed in an epoch come with new ones of like length, so that few positions are padded. Like
BatchOrder it is stateless: a batch follows from lengths, seed and index alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import numpy as np

from nested_core.data.batches import (
    BatchRows,
    choose_padded_widths,
    cost_of_a_width,
    round_up_widths,
    widen_to_fast_widths,
)
from nested_core.data.tokens.tokenized_split import Bool, Int32, Int64, TokenizedSplit
from nested_core.rooms.replay.replay_draws import Weighting, draw_rows

MAX_DENOMINATOR = 1_000_000  # of the fraction as a ratio of whole numbers: 0.1 is one in ten
Count = TypeVar("Count", int, Int64)


@dataclass(frozen=True, eq=False)
class ReplayedRows:
    """The rows that may be replayed, and how.

    lengths: tokens of each row, int64 [n].
    sources: the age of each row's source, 0 for the newest, ascending, int64 [n].
    rows: how many rows each source had before rows were chosen.
    fraction: of a batch.
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
        """The tokens of one example, int32 [length], as a view."""
        split, row = self._find(index)
        return split.example(row)

    def example_mask(self, index: int) -> Bool:
        """The target mask of one example, bool [length], as a view."""
        split, row = self._find(index)
        return split.example_mask(row)

    def _find(self, index: int) -> tuple[TokenizedSplit, int]:
        later = index - len(self.new)
        return (self.new, index) if later < 0 else (self.replayed, later)

    def count_supervised(self) -> Int64:
        """Tokens of each example that the loss counts, int64 [n]."""
        return np.concatenate([self.new.count_supervised(), self.replayed.count_supervised()])

    def release_pages(self) -> None:
        """Release the memory pages of the mapped files, so that none stay in this process."""
        self.new.release_pages()
        self.replayed.release_pages()


@dataclass(frozen=True, eq=False)
class _Window:
    """The batches that begin in one epoch, from `first`; the rows of all, and where each begins."""

    first: int
    new: Int32
    new_starts: Int64
    replayed: Int32
    replayed_starts: Int64
    widths: Int64


class ReplayedBatchOrder:
    """The batches of a run with replay; rows from number `len(lengths)` on are replayed ones.

    An epoch ends within a batch: its last rows, short ones, share it with the first of the next.
    The permutations of an epoch come from Philox under the key (seed, epoch), as in BatchOrder.
    """

    def __init__(
        self,
        lengths: Int64,
        replay: ReplayedRows,
        batch_size: int,
        seed: int,
        *,
        max_seq_length: int,
    ) -> None:
        self.batch_size = batch_size
        self._seed = seed
        self._replay = replay
        self._ratio = Fraction(str(replay.fraction)).limit_denominator(MAX_DENOMINATOR)
        self._count = len(lengths)
        all_lengths = np.concatenate([lengths, replay.lengths])
        needed = round_up_widths(np.maximum(all_lengths - 1, 0)).clip(max=max_seq_length)
        self._needed = widen_to_fast_widths(needed)
        self._drawn = np.zeros(0, np.int32)
        self._sorted = np.argsort(-self._needed[: self._count], kind="stable").astype(np.int32)
        self._widths = self._needed[:0]
        self._class_starts = np.array([0, self._count])
        self._epoch = lru_cache(maxsize=3)(self._shuffle_epoch)
        self._window = lru_cache(maxsize=2)(self._fill_window)
        self._choose_widths()

    def count_replayed(self, batches: Count) -> Count:
        """How many rows are replayed in the first so many batches."""
        return batches * self.batch_size * self._ratio.numerator // self._ratio.denominator

    def _count_new(self, batches: Count) -> Count:
        return batches * self.batch_size - self.count_replayed(batches)

    def count_batches(self, epochs: float) -> int:
        """How many batches it takes to use each new example so many times."""
        wanted = math.ceil(epochs * self._count)
        enough = math.ceil(wanted / (self.batch_size * (1 - self._ratio))) + 1
        return bisect_left(range(enough), wanted, key=self._count_new)

    def count_epochs(self, batches: int) -> float:
        """How many times each new example is used in so many batches."""
        return self._count_new(batches) / self._count

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width that a batch can have, ascending."""
        return tuple(map(int, self._widths))

    def find_widest(self, most: int) -> tuple[Int32, int]:
        """The longest rows, at most so many, and the largest width."""
        rows = np.argsort(-self._needed, kind="stable")[:most].astype(np.int32)
        return rows, self.widths[-1]

    def batch(self, index: int) -> BatchRows:
        """The batch at a position, from 0; the same in every process."""
        window = self._window(self._count_new(index) // self._count)
        place = index - window.first
        new = window.new[window.new_starts[place] : window.new_starts[place + 1]]
        replayed = window.replayed[
            window.replayed_starts[place] : window.replayed_starts[place + 1]
        ]
        return BatchRows(np.concatenate([new, replayed]), int(window.widths[place]))

    def sum_replayed(self, values: Int64, batches: int) -> int:
        """The sum of a value a row over the replayed rows of the first so many batches.

        values: int64 [n], one for each row, new ones too.
        """
        window = self._window(self._count_new(batches) // self._count)
        earlier = self._draw(self.count_replayed(window.first)) + self._count
        within = window.replayed[: window.replayed_starts[batches - window.first]]
        return int(values[earlier].sum() + values[within].sum())

    def largest_sums(self, values: Int64, rank: int = 0, ranks: int = 1) -> dict[int, int]:
        """For each width, the largest sum of a value a row over a batch of the first epoch.

        The arguments are those of `BatchOrder.largest_sums`.
        """
        window = self._window(0)
        sums = np.zeros(len(window.widths), np.int64)
        new_sizes = np.diff(window.new_starts)
        for rows, starts, before in (
            (window.new, window.new_starts, np.zeros_like(new_sizes)),
            (window.replayed, window.replayed_starts, new_sizes),
        ):
            sizes = np.diff(starts)
            batches = np.repeat(np.arange(len(sizes)), sizes)
            places = np.arange(len(rows)) - np.repeat(starts[:-1] - before, sizes)
            is_own = places % ranks == rank
            np.add.at(sums, batches[is_own], values[rows[is_own]])
        return {int(w): int(sums[window.widths == w].max()) for w in np.unique(window.widths)}

    def _draw(self, count: int) -> Int32:
        """The first draws, as numbers of replayed rows; more than were asked for are kept."""
        if count > len(self._drawn):
            replay = self._replay
            self._drawn = draw_rows(
                replay.sources, replay.rows, 2 * count, replay.weighting, self._seed
            )
        return self._drawn[:count]

    def _choose_widths(self) -> None:
        """Choose the widths that cost least, by the batches of the first epoch in order of length.

        New rows that need the same of them are shuffled among themselves.
        """
        last = self.count_batches(1)
        batches = np.arange(last + 1)
        longest = self._needed[self._sorted[self._count_new(batches[:-1])]]
        taken = self.count_replayed(batches)
        drawn = self._needed[self._draw(int(taken[-1])) + self._count]
        drawn = np.append(np.sort(drawn)[::-1], 0)
        is_mixed = np.diff(taken) > 0
        longest = np.maximum(longest, np.where(is_mixed, drawn[taken[:-1]], 0))
        widths, counts = np.unique(np.append(longest, self._needed.max()), return_counts=True)
        cost = cost_of_a_width(self.batch_size, last)
        self._widths = choose_padded_widths(widths, counts, cost)
        classes = np.searchsorted(self._widths, self._needed[self._sorted])
        firsts = np.flatnonzero(np.diff(classes, prepend=-1))
        self._class_starts = np.append(firsts, self._count)

    def _shuffle_epoch(self, epoch: int) -> Int32:
        """The new rows in the order in which an epoch uses them."""
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        rows = self._sorted.copy()
        for start, end in pairwise(self._class_starts):
            generator.shuffle(rows[start:end])
        begin, end = epoch * self._count, (epoch + 1) * self._count
        first = bisect_right(range(self.count_batches(epoch) + 1), begin, key=self._count_new) - 1
        bounds = self._count_new(np.arange(first, self.count_batches(epoch + 1) + 1))
        edges = np.unique(np.clip(bounds, begin, end)) - begin  # of the parts of batches in it
        sizes = np.diff(edges)
        parts = np.arange(len(sizes))
        is_shared = np.zeros(len(sizes), bool)
        is_shared[0] |= bounds[0] < begin
        is_shared[-1] |= bounds[-1] > end
        order = np.concatenate([generator.permutation(parts[~is_shared]), parts[is_shared]])
        starts = np.empty(len(sizes), np.int64)  # of each part, in the rows by length
        starts[order] = np.cumsum(sizes[order]) - sizes[order]
        return rows[np.repeat(starts - edges[:-1], sizes) + np.arange(self._count)]

    def _fill_window(self, epoch: int) -> _Window:
        """The batches that begin in an epoch: new rows, and replayed ones of like length."""
        first, last = self.count_batches(epoch), self.count_batches(epoch + 1)
        batches = np.arange(first, last + 1)
        new_starts = self._count_new(batches)
        replayed_starts = self.count_replayed(batches)
        rows = self._epoch(epoch)[new_starts[0] - epoch * self._count :]
        missing = new_starts[-1] - new_starts[0] - len(rows)
        if missing > 0:
            rows = np.concatenate([rows, self._take_following(epoch + 1, missing)])
        new_starts -= new_starts[0]
        longest = self._longest_rows(rows, new_starts)
        drawn = self._draw(int(replayed_starts[-1]))[replayed_starts[0] :] + np.int32(self._count)
        replayed_starts -= replayed_starts[0]
        # The longest with the longest: no other pairing pads less.
        slots = np.repeat(np.arange(len(longest)), np.diff(replayed_starts))
        replayed = np.empty_like(drawn)
        by_length = np.argsort(longest[slots], kind="stable")
        replayed[by_length] = drawn[np.argsort(self._needed[drawn], kind="stable")]
        longest = np.maximum(longest, self._longest_rows(replayed, replayed_starts))
        widths = self._widths[np.searchsorted(self._widths, longest)]
        return _Window(first, rows, new_starts, replayed, replayed_starts, widths)

    def _take_following(self, epoch: int, count: int) -> Int32:
        """The first rows of the epochs from one on."""
        epochs = range(epoch, epoch - (-count // self._count) + 1)
        return np.concatenate([self._epoch(each) for each in epochs])[:count]

    def _longest_rows(self, rows: Int32, starts: Int64) -> Int64:
        """What the longest row of each batch needs; 0 for a batch without any."""
        needed = np.append(self._needed[rows], 0)
        longest: Int64 = np.where(np.diff(starts) > 0, np.maximum.reduceat(needed, starts[:-1]), 0)
        return longest
