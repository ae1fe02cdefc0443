"""Batches: group rows of similar length, order the batches, and pad them to arrays.

`mx.compile` keeps one trace for each width, and each row is padded to one: the widths are chosen
from the data's own lengths, so that the total cost is minimal. The order is stateless: batch
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
from numpy.typing import ArrayLike

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
    """All rows sorted by length, longest first, in buckets of rows that are padded to one width.

    rows: the rows' numbers, int32 [n].
    starts: where in `rows` each bucket begins and the last one ends, int64 [k + 1]; multiples of
        the batch size, except for the last.
    widths: the width of each bucket in input tokens, descending, int64 [k].
    padding_share: the share of padding in all batches of an epoch.
    """

    rows: Int32
    starts: Int64
    widths: Int64
    batch_size: int
    padding_share: float

    def bucket_width_at(self, start: int) -> int:
        """Return the width of the bucket that contains a position in `rows`."""
        return int(self.widths[np.searchsorted(self.starts, start, "right") - 1])


def sort_into_buckets(
    lengths: ArrayLike, batch_size: int, max_seq_length: int | None = None
) -> LengthBuckets:
    """Sort rows by length into buckets: batches that are padded to one width.

    max_seq_length: the largest width, in tokens; None for no limit.
    lengths: tokens of each row, [n]; a row has one input token fewer.

    Every batch is full except for the one with the shortest rows, where missing rows cost least.
    The padding share is 1 - input tokens / (batch size * width), over one epoch. Raises ValueError
    without any row.
    """
    needed = np.maximum(np.asarray(lengths, np.int64) - 1, 0)
    if not len(needed):
        raise ValueError("a batch plan needs at least one example, and there is none")
    # Each batch's width is that of its first row, the longest
    rows = np.argsort(-needed, kind="stable").astype(np.int32)
    longest = round_up_widths(needed[rows[::batch_size]])
    if max_seq_length is not None:
        longest = longest.clip(max=max_seq_length)
    longest = widen_to_fast_widths(longest)
    tokens = int(needed.sum())
    # From the widths that batches need, few are chosen, as each costs a compiled step
    widths, counts = np.unique(longest, return_counts=True)
    chosen = choose_padded_widths(widths, counts, cost_of_a_width(batch_size, len(longest)))
    choice = np.searchsorted(chosen, longest)  # of each batch, the narrowest width that holds it
    # A bucket begins where the width changes
    firsts = np.flatnonzero(np.diff(choice, prepend=-1))
    starts = np.append(firsts * batch_size, len(rows)).astype(np.int64)
    padded = int(chosen[choice].sum()) * batch_size
    return LengthBuckets(rows, starts, chosen[choice[firsts]], batch_size, 1 - tokens / padded)


def cost_of_a_width(batch_size: int, batches: int) -> float:
    """Return what one more width costs, as padded tokens per row of a batch.

    batches: how many an epoch has.
    """
    on_cuda = backend.is_mlx_built_for_cuda()
    positions = POSITIONS_PER_TRACE_ON_CUDA if on_cuda else POSITIONS_PER_TRACE
    return positions / batch_size / max(1.0, MIN_BATCHES_COUNTED / batches)


def widen_to_fast_widths(widths: Int64) -> Int64:
    """Widen each width to a multiple of 128 if that adds at most 4 %, else to an even number.

    Our kernels accept only even numbers of positions.
    """
    fast = -(-widths // FAST_WIDTH_MULTIPLE) * FAST_WIDTH_MULTIPLE
    is_near = fast <= widths * (1 + MAX_PADDING_TO_FAST_WIDTH)
    return np.where(is_near, fast, widths + widths % 2)


def round_up_widths(needed: Int64) -> Int64:
    """Round widths up: to 1 up to 128, to multiples of 2 up to 256, of 4 up to 512, and so on.

    Multiples suit kernels, and leave at most 64 widths per octave to choose from.
    """
    needed = np.maximum(needed, 1)
    octave = np.int64(1) << (np.frexp(needed - 0.5)[1].astype(np.int64) - 1).clip(0)
    step = np.maximum(octave // WIDTHS_PER_OCTAVE, 1)
    widths: Int64 = (needed + step - 1) // step * step
    return widths


def choose_padded_widths(widths: Int64, counts: Int64, cost_of_width: float) -> Int64:
    """Choose the widths to pad batches to that cost least in total, by dynamic programming.

    Few widths need few compiled steps, many widths need little padding.

    widths: the candidates, ascending; the widest is always chosen.
    counts: how many batches need each width.
    cost_of_width: what each chosen width costs, besides the padded length of all batches.

    With k widths, the last of them widths[j], the least padded length of all batches up to j is
    cost[k][j] = min over i < j of cost[k - 1][i] + widths[j] * (batches after i, up to j).
    """
    # One width: all batches are padded to the widest
    done = np.cumsum(counts)  # [j]: how many batches need width j or a narrower one
    cost, before = (widths * done).astype(np.float64), list[np.typing.NDArray[np.int64]]()
    totals = [cost[-1] + cost_of_width]  # by the number of widths
    is_after = np.tri(len(widths), dtype=bool)  # i >= j
    # One width more in each round, until it costs more than it saves
    while len(totals) < min(len(widths), MAX_DISTINCT_WIDTHS):
        options = np.where(is_after, _IMPOSSIBLE_COST, cost[:, None] - widths * done[:, None])
        before.append(options.argmin(axis=0))
        cost = np.minimum(cost, widths * done + options.min(axis=0))
        totals.append(cost[-1] + cost_of_width * (len(totals) + 1))
        if totals[-1] > totals[-2]:  # what one more width saves only falls
            break
    # Follow the best choices back from the widest width
    last, chosen = len(widths) - 1, [len(widths) - 1]
    for step in reversed(before[: int(np.argmin(totals))]):
        if last == 0:
            break
        last = int(step[last])
        chosen.append(last)
    return widths[chosen[::-1]]


@dataclass(frozen=True, eq=False)
class BatchRows:
    """The row numbers of one batch, int32 [at most batch_size], and its width in input tokens."""

    rows: Int32
    width: int


class ExampleRows(Protocol):
    """Tokenized examples, accessed by their number from 0."""

    def example(self, index: int) -> Int32:
        """Return the tokens of one example, int32 [length]."""

    def example_mask(self, index: int) -> Bool:
        """Return the target mask of one example, bool [length]."""

    def count_supervised(self) -> Int64:
        """Return how many tokens of each example the loss counts, int64 [n]."""

    def release_pages(self) -> None:
        """Release the memory pages of mapped files."""


def make_batch_arrays(split: ExampleRows, batch: BatchRows, batch_size: int) -> tuple[Int32, Bool]:
    """Build the arrays of a batch: tokens int32 [batch_size, width + 1], and target_mask.

    inputs = tokens[:, :-1], targets = tokens[:, 1:]. target_mask, bool [batch_size, width], tells
    in column j whether the loss counts the target there, which is token j + 1. Padding is token 0
    with mask False, and so are missing rows.
    """
    tokens = np.zeros((batch_size, batch.width + 1), np.int32)
    target_mask = np.zeros((batch_size, batch.width), np.bool_)
    for position, row in enumerate(batch.rows):
        example = split.example(row)
        tokens[position, : len(example)] = example
        targets = split.example_mask(row)[1:]  # of no tokens none, not even the first
        target_mask[position, : len(targets)] = targets
    split.release_pages()
    return tokens, target_mask


class BatchOrder:
    """The batches of every epoch: each example once, batched with examples of similar length.

    A batch's index counts over epochs; epoch = index // batches_per_epoch. The permutation of an
    epoch comes from Philox, a counter-based generator, with the key (seed, epoch). One batch, of
    the shortest examples, may be partial. Takes some 20 bytes of memory per example.
    """

    def __init__(
        self, lengths: ArrayLike, batch_size: int, seed: int, *, max_seq_length: int | None = None
    ) -> None:
        """Sort rows of these lengths (in tokens) into buckets; `seed` determines the order."""
        self.batch_size = batch_size
        self.seed = seed
        self.buckets = sort_into_buckets(lengths, batch_size, max_seq_length)
        self._epoch = lru_cache(maxsize=2)(self._shuffle_epoch)

    @property
    def batches_per_epoch(self) -> int:
        """How many batches use each example once."""
        return -(-len(self.buckets.rows) // self.batch_size)

    def count_batches(self, epochs: float) -> int:
        """Return how many batches use each example `epochs` times."""
        return math.ceil(epochs * self.batches_per_epoch)

    def count_epochs(self, batches: int) -> float:
        """Return how many times each example is used in this many batches."""
        return batches / self.batches_per_epoch

    def find_widest(self, most: int) -> tuple[Int32, int]:
        """Return at most `most` rows with the largest width, longest first, and that width."""
        end = min(int(self.buckets.starts[1]), most)
        return self.buckets.rows[:end], self.buckets.bucket_width_at(0)

    def batch(self, index: int) -> BatchRows:
        """Return the batch with this index, from 0; it is the same in every process."""
        epoch, position = divmod(index, self.batches_per_epoch)
        rows, order = self._epoch(epoch)
        start = int(order[position]) * self.batch_size
        return BatchRows(rows[start : start + self.batch_size], self.buckets.bucket_width_at(start))

    def arrays(self, split: ExampleRows, index: int) -> tuple[Int32, Bool]:
        """Return tokens and target_mask (see `make_batch_arrays`) of the batch with this index."""
        return make_batch_arrays(split, self.batch(index), self.batch_size)

    def largest_sums(self, values: Int64, rank: int = 0, ranks: int = 1) -> dict[int, int]:
        """Return for each width the largest sum of the rows' values in a batch of epoch 0.

        Args:
            values: int64 [n], one for each row.
            rank: whose rows of each batch are summed: every `ranks`-th from this one on.
            ranks: how many processes share the rows of a batch.
        """
        rows, _ = self._epoch(0)
        sums = np.zeros(self.batches_per_epoch * self.batch_size, np.int64)
        sums[: len(rows)] = values[rows]
        sums = sums.reshape(-1, self.batch_size)[:, rank::ranks].sum(axis=1)
        largest = np.maximum.reduceat(sums, self.buckets.starts[:-1] // self.batch_size)
        return dict(zip(self.buckets.widths.tolist(), largest.tolist(), strict=True))

    def _shuffle_epoch(self, epoch: int) -> tuple[Int32, Int32]:
        """Return the rows shuffled within each bucket, and the order of the epoch's batches."""
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
    """Return the batches of every evaluation, longest examples first.

    max_seq_length: the largest width, in tokens; None for no limit.
    max_batches: -1 for all. Fewer are chosen evenly spaced, without randomness, so that two
        evaluations differ by the weights alone. The last batch may be partial.
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
