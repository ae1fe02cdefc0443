"""Batches: rows of like length put together, the order of the batches, and their padded arrays.

`mx.compile` keeps one trace for each width, and each row is padded to one: the widths are chosen
from the data's own lengths, so that no other choice costs less. The order is stateless: batch
`index` follows from the lengths, the seed and the index alone, so that a resumed run needs no
replay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from nested_core import backend

if TYPE_CHECKING:  # a loss imports this file, and needs numpy alone
    from nested_core.data.tokens.tokenized_split import Bool, Int32, Int64, TokenizedSplit

MAX_DISTINCT_WIDTHS = 96
# What a width costs once, in positions of a batch: its trace, and on CUDA plans and memory as well,
# for MLX keeps the freed buffers of each width.
POSITIONS_PER_TRACE = 6_000
POSITIONS_PER_TRACE_ON_CUDA = 48_000
MIN_BATCHES_COUNTED = 1_000  # of a run that passes over few rows again and again
WIDTHS_PER_OCTAVE = 64
FAST_WIDTH_MULTIPLE = 128  # attention's backward pass is fastest at these on CUDA
MAX_PADDING_TO_FAST_WIDTH = 0.04  # more costs more than it saves
_IMPOSSIBLE_COST = np.inf


@dataclass(frozen=True, eq=False)
class LengthBuckets:
    """All rows, longest first, in stretches that are padded to one width.

    rows: int32 [n]; starts: int64 [k + 1], where in `rows` each bucket begins and the last ends,
    multiples of the batch size but for the last; widths: int64 [k], in input tokens, descending.
    """

    rows: Int32
    starts: Int64
    widths: Int64
    batch_size: int
    padding_share: float

    def bucket_width_at(self, start: int) -> int:
        """The width of the bucket that a place in `rows` is in."""
        return int(self.widths[np.searchsorted(self.starts, start, "right") - 1])


def sort_into_buckets(
    lengths: npt.ArrayLike, batch_size: int, max_seq_length: int | None = None
) -> LengthBuckets:
    """Sort the rows into buckets of whole batches; ValueError without any row.

    Every batch is full but the last, of the shortest rows, where empty ones cost least. The padding
    share is 1 - input tokens / (batch size * width), over one epoch.
    """
    needed = np.maximum(np.asarray(lengths, np.int64) - 1, 0)
    if not len(needed):
        raise ValueError("a batch plan needs at least one example, and there is none")
    rows = np.argsort(-needed, kind="stable").astype(np.int32)
    longest = round_up_widths(needed[rows[::batch_size]])
    if max_seq_length is not None:
        longest = longest.clip(max=max_seq_length)
    longest = widen_to_fast_widths(longest)
    tokens = int(needed.sum())
    widths, counts = np.unique(longest, return_counts=True)
    chosen = choose_padded_widths(widths, counts, cost_of_a_width(batch_size, len(longest)))
    places = np.searchsorted(chosen, longest)  # of each batch, the narrowest width that holds it
    firsts = np.flatnonzero(np.diff(places, prepend=-1))
    starts = np.append(firsts * batch_size, len(rows)).astype(np.int64)
    padded = int(chosen[places].sum()) * batch_size
    return LengthBuckets(rows, starts, chosen[places[firsts]], batch_size, 1 - tokens / padded)


def cost_of_a_width(batch_size: int, batches: int) -> float:
    """What one more width costs, in positions of a row, for so many batches an epoch."""
    on_cuda = backend.is_mlx_built_for_cuda()
    positions = POSITIONS_PER_TRACE_ON_CUDA if on_cuda else POSITIONS_PER_TRACE
    return positions / batch_size / max(1.0, MIN_BATCHES_COUNTED / batches)


def widen_to_fast_widths(widths: Int64) -> Int64:
    """Each width, or the next multiple of 128 where that is at most 4 % more; even in any case.

    Our kernels take even numbers of positions alone.
    """
    fast = -(-widths // FAST_WIDTH_MULTIPLE) * FAST_WIDTH_MULTIPLE
    is_near = fast <= widths * (1 + MAX_PADDING_TO_FAST_WIDTH)
    widened: Int64 = np.where(is_near, fast, widths + widths % 2)
    return widened


def round_up_widths(needed: Int64) -> Int64:
    """Every width up to 128, multiples of 2 up to 256, of 4 up to 512, and so on.

    Long widths are multiples that kernels like, and no more than 64 an octave are chosen from.
    """
    needed = np.maximum(needed, 1)
    octave = np.int64(1) << (np.frexp(needed - 0.5)[1].astype(np.int64) - 1).clip(0)
    step = np.maximum(octave // WIDTHS_PER_OCTAVE, 1)
    widths: Int64 = (needed + step - 1) // step * step
    return widths


def choose_padded_widths(widths: Int64, counts: Int64, cost_of_width: float) -> Int64:
    """The choice among these ascending widths that costs least; the widest is always in it.

    `counts` are the batches that need each width. A choice costs the padded length of all batches,
    and `cost_of_width` for each of its widths. With k widths, the last of them widths[j], the least
    padded length of all batches up to j is cost[k][j] = min over i < j of cost[k - 1][i] +
    widths[j] * (batches after i, up to j).
    """
    done = np.cumsum(counts)
    cost, before = (widths * done).astype(np.float64), list[npt.NDArray[np.int64]]()
    totals = [cost[-1] + cost_of_width]  # by the number of widths
    is_after = np.tri(len(widths), dtype=bool)  # i >= j
    while len(totals) < min(len(widths), MAX_DISTINCT_WIDTHS):
        options = np.where(is_after, _IMPOSSIBLE_COST, cost[:, None] - widths * done[:, None])
        before.append(options.argmin(axis=0))
        cost = np.minimum(cost, widths * done + options.min(axis=0))
        totals.append(cost[-1] + cost_of_width * (len(totals) + 1))
        if totals[-1] > totals[-2]:  # what one more width saves only falls
            break
    last, chosen = len(widths) - 1, [len(widths) - 1]
    for step in reversed(before[: int(np.argmin(totals))]):
        if last == 0:
            break
        last = int(step[last])
        chosen.append(last)
    narrowest_first: Int64 = widths[chosen[::-1]]
    return narrowest_first


@dataclass(frozen=True, eq=False)
class BatchRows:
    """The rows of one batch, int32 [at most batch_size], and the width of its inputs in tokens."""

    rows: Int32
    width: int


class ExampleRows(Protocol):
    """Examples by their number, from 0."""

    def example(self, index: int) -> Int32:
        """The tokens of one example, int32 [length]."""

    def example_mask(self, index: int) -> Bool:
        """The target mask of one example, bool [length]."""

    def count_supervised(self) -> Int64:
        """Tokens of each example that the loss counts, int64 [n]."""

    def release_pages(self) -> None:
        """Release the memory pages of mapped files."""


def make_batch_arrays(split: ExampleRows, batch: BatchRows, batch_size: int) -> tuple[Int32, Bool]:
    """Tokens int32 [batch_size, width + 1], padded with 0; target_mask bool [batch_size, width].

    inputs = tokens[:, :-1], targets = tokens[:, 1:]; target_mask[:, j] is about the target in
    column j, which is token j + 1. It is false at padding and in rows without an example.
    """
    tokens = np.zeros((batch_size, batch.width + 1), np.int32)
    target_mask = np.zeros((batch_size, batch.width), np.bool_)
    for place, row in enumerate(batch.rows):
        example = split.example(row)
        tokens[place, : len(example)] = example
        targets = split.example_mask(row)[1:]  # of no tokens none, not even the first
        target_mask[place, : len(targets)] = targets
    split.release_pages()
    return tokens, target_mask


class BatchPlan(Protocol):
    """Which rows form which batch, as a function of its index from 0."""

    def count_batches(self, epochs: float) -> int:
        """How many batches it takes to use each of the run's own examples so many times."""

    def count_epochs(self, batches: int) -> float:
        """How many times each of the run's own examples is used in so many batches."""

    def find_widest(self, most: int) -> tuple[Int32, int]:
        """The longest rows, at most so many, and the largest width."""

    def batch(self, index: int) -> BatchRows:
        """The batch at a position; the same in every process."""

    def largest_sums(self, values: Int64, rank: int = 0, ranks: int = 1) -> dict[int, int]:
        """For each width, the largest sum of a value a row over a batch of the first epoch."""


class BatchOrder:
    """The batches of every epoch: each example once, together with examples of its bucket.

    Position is the iteration's index from 0; epoch = index // batches_per_epoch. The permutation of
    an epoch comes from Philox, a counter-based generator, under the key (seed, epoch). One batch
    of the shortest examples may be partial. Takes some 20 bytes of memory an example.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        batch_size: int,
        seed: int,
        *,
        max_seq_length: int | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.buckets = sort_into_buckets(lengths, batch_size, max_seq_length)
        self._epoch = lru_cache(maxsize=2)(self._shuffle_epoch)

    @property
    def batches_per_epoch(self) -> int:
        """How many batches it takes to use each example once."""
        return -(-len(self.buckets.rows) // self.batch_size)

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width that a batch of this plan can have, ascending."""
        return tuple(sorted(map(int, self.buckets.widths)))

    def count_batches(self, epochs: float) -> int:
        """How many batches it takes to use each example so many times."""
        return math.ceil(epochs * self.batches_per_epoch)

    def count_epochs(self, batches: int) -> float:
        """How many times each example is used in so many batches."""
        return batches / self.batches_per_epoch

    def find_widest(self, most: int) -> tuple[Int32, int]:
        """The longest rows of those that are padded to the largest width, at most so many; it."""
        end = min(int(self.buckets.starts[1]), most)
        return self.buckets.rows[:end], self.buckets.bucket_width_at(0)

    def batch(self, index: int) -> BatchRows:
        """The batch at a position, from 0; the same in every process."""
        epoch, position = divmod(index, self.batches_per_epoch)
        rows, order = self._epoch(epoch)
        start = int(order[position]) * self.batch_size
        return BatchRows(rows[start : start + self.batch_size], self.buckets.bucket_width_at(start))

    def arrays(self, split: ExampleRows, index: int) -> tuple[Int32, Bool]:
        """`make_batch_arrays` of the batch at a position."""
        return make_batch_arrays(split, self.batch(index), self.batch_size)

    def largest_sums(self, values: Int64, rank: int = 0, ranks: int = 1) -> dict[int, int]:
        """For each width, the largest sum of a value a row over a batch of the first epoch.

        Args:
            values: int64 [n], one for each row.
            rank: whose rows of each batch are summed: every `ranks`-th from this one on.
            ranks: into how many parts the rows of a batch are divided.
        """
        rows, _ = self._epoch(0)
        sums = np.zeros(self.batches_per_epoch * self.batch_size, np.int64)
        sums[: len(rows)] = values[rows]
        sums = sums.reshape(-1, self.batch_size)[:, rank::ranks].sum(axis=1)
        starts = self.buckets.starts[:-1] // self.batch_size
        largest = np.maximum.reduceat(sums, starts)
        return dict(zip(self.buckets.widths.tolist(), largest.tolist(), strict=True))

    def _shuffle_epoch(self, epoch: int) -> tuple[Int32, Int32]:
        """The rows, shuffled within each bucket, and the order of their batches."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        rows = self.buckets.rows.copy()
        for start, end in pairwise(self.buckets.starts):
            generator.shuffle(rows[start:end])
        return rows, generator.permutation(np.arange(self.batches_per_epoch, dtype=np.int32))


def choose_evaluation_batches(
    split: TokenizedSplit,
    batch_size: int,
    max_batches: int = -1,
    *,
    max_seq_length: int | None = None,
) -> list[BatchRows]:
    """The same batches at every evaluation, longest examples first; -1 is all of them.

    All rows are used, the last partial batch too. Of fewer batches each stands in the middle of an
    equal part of all, never chosen by chance, so that two evaluations differ by the weights alone.
    """
    if not len(split):
        return []
    buckets = sort_into_buckets(split.lengths, batch_size, max_seq_length)
    starts = np.arange(0, len(split), batch_size)
    if 0 <= max_batches < len(starts):
        middles = (np.arange(max_batches) + 0.5) * len(starts) / max_batches
        starts = starts[middles.astype(np.int64)]
    rows = buckets.rows
    return [BatchRows(rows[s : s + batch_size], buckets.bucket_width_at(int(s))) for s in starts]
