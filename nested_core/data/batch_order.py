"""The order of batches: which rows are in which batch, shuffled anew for each epoch.

Stateless: batch `index` follows from the lengths, the seed and the index alone, so that a resumed
run needs no replay. Few fixed shapes, for `mx.compile` keeps one trace for each.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from nested_core.data.batch_arrays import BatchRows, make_batch_arrays
from nested_core.data.length_buckets import sort_into_buckets
from nested_core.data.tokens.tokenized_split import Bool, Int32, TokenizedSplit


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

    All rows are used, the last partial batch too. Fewer batches are chosen evenly over the lengths,
    never by chance, so that two evaluations differ by the weights alone.
    """
    if not len(split):
        return []
    buckets = sort_into_buckets(split.lengths, batch_size, max_seq_length)
    starts = np.arange(0, len(split), batch_size)
    if 0 <= max_batches < len(starts):
        chosen = np.linspace(0, len(starts) - 1, max_batches).round().astype(np.int64)
        starts = starts[chosen]
    rows = buckets.rows
    return [BatchRows(rows[s : s + batch_size], buckets.bucket_width_at(int(s))) for s in starts]
