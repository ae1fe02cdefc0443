"""The order of batches: which rows are in which batch, shuffled anew for each epoch.

Stateless: batch `index` follows from the lengths, the seed and the index alone, so that a resumed
run needs no replay. Few fixed shapes, for `mx.compile` keeps one trace for each.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from nested_core.data.array_types import Bool, Int32, Int64
from nested_core.data.batch_arrays import BatchRows, make_batch_arrays
from nested_core.data.length_buckets import sort_into_buckets
from nested_core.data.tokens.tokenized_split import TokenizedSplit


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

    def batch(self, index: int) -> BatchRows:
        """The batch at a position, from 0; the same in every process."""
        epoch, position = divmod(index, self.batches_per_epoch)
        rows, order = self._epoch(epoch)
        start = int(order[position]) * self.batch_size
        return BatchRows(rows[start : start + self.batch_size], self.buckets.bucket_width_at(start))

    def arrays(self, split: TokenizedSplit, index: int) -> tuple[Int32, Bool]:
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
