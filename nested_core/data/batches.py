"""Which examples train together at which step, and the arrays that hold them.

Stateless: batch `index` follows from the lengths, the seed and the index alone, so that a resumed
run needs no replay. Few fixed shapes, for `mx.compile` keeps one trace for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from nested_core.data.tokens import Bool, Int32, Int64, TokenizedSplit

WIDTHS_PER_OCTAVE = 8
WIDTH_MULTIPLE = 4


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one batch, int64 [at most batch_size], and the width of its inputs in tokens."""

    rows: Int64
    width: int


def bucket_widths(lengths: npt.ArrayLike, max_seq_length: int | None = None) -> Int64:
    """The width of inputs (length - 1 tokens, rounded up) for each example, int64 [n].

    Up to eight widths an octave, all multiples of 4, so that rounding pads by an eighth at most
    above 32 tokens; none above `max_seq_length`.
    """
    needed = np.maximum(np.asarray(lengths, np.int64) - 1, 1)
    octave = np.int64(1) << (np.frexp(needed - 0.5)[1].astype(np.int64) - 1).clip(0)
    step = np.maximum(octave // WIDTHS_PER_OCTAVE, WIDTH_MULTIPLE)
    widths: Int64 = (needed + step - 1) // step * step
    return widths if max_seq_length is None else widths.clip(max=max_seq_length)


class BatchPlan:
    """The batches of every epoch: each example once, together with examples of its width.

    Position is the iteration's index from 0; epoch = index // batches_per_epoch. The permutation of
    an epoch comes from Philox, a counter-based generator, under the key (seed, epoch). One batch
    of the narrowest examples may be partial, where the empty rows that fill it up cost least.
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
        self._row_widths = bucket_widths(lengths, max_seq_length)
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)
        if not len(self._row_widths):
            raise ValueError("a batch plan needs at least one example, and there is none")

    @property
    def batches_per_epoch(self) -> int:
        """How many batches it takes to use each example once."""
        return -(-len(self._row_widths) // self.batch_size)

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width that a batch of this plan can have, ascending."""
        return tuple(int(width) for width in np.unique(self._row_widths))

    def batch(self, index: int) -> Batch:
        """The batch at a position, from 0; the same in every process."""
        epoch, position = divmod(index, self.batches_per_epoch)
        rows, order = self._epoch(epoch)
        start = int(order[position]) * self.batch_size
        chosen = rows[start : start + self.batch_size]
        return Batch(chosen, int(self._row_widths[chosen].max()))

    def arrays(self, split: TokenizedSplit, index: int) -> tuple[Int32, Bool]:
        """`batch_arrays` of the batch at a position."""
        return batch_arrays(split, self.batch(index), self.batch_size)

    def _plan_epoch(self, epoch: int) -> tuple[Int64, Int64]:
        """The rows, widest first and shuffled within a width, and the order of their batches."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        shuffled = generator.permutation(len(self._row_widths))
        by_width = np.argsort(-self._row_widths[shuffled], kind="stable")
        return shuffled[by_width], generator.permutation(self.batches_per_epoch)


def batch_arrays(split: TokenizedSplit, batch: Batch, batch_size: int) -> tuple[Int32, Bool]:
    """Tokens int32 [batch_size, width + 1], padded with 0, and supervised bool [batch_size, width].

    inputs = tokens[:, :-1], targets = tokens[:, 1:]; supervised[:, j] is about the target in column
    j, which is token j + 1. Neither padding nor a missing row has a supervised target.
    """
    tokens = np.zeros((batch_size, batch.width + 1), np.int32)
    supervised = np.zeros((batch_size, batch.width), np.bool_)
    for place, row in enumerate(batch.rows):
        example = split.example(row)
        tokens[place, : len(example)] = example
        learnt = split.supervision(row)[1:]
        supervised[place, : len(learnt)] = learnt
    split.give_back()
    return tokens, supervised


def evaluation_batches(
    split: TokenizedSplit,
    batch_size: int,
    max_batches: int = -1,
    *,
    max_seq_length: int | None = None,
) -> list[Batch]:
    """The same batches at every evaluation, longest examples first; -1 is all of them.

    All rows are used, the last partial batch too. Fewer batches are chosen evenly over the lengths,
    never by chance, so that two evaluations differ by the weights alone.
    """
    widths = bucket_widths(split.lengths, max_seq_length)
    rows = np.argsort(-split.lengths, kind="stable")
    starts = np.arange(0, len(rows), batch_size)
    if 0 <= max_batches < len(starts):
        chosen = np.linspace(0, len(starts) - 1, max_batches).round().astype(np.int64)
        starts = starts[chosen]
    groups = [rows[start : start + batch_size] for start in starts]
    return [Batch(group, int(widths[group].max())) for group in groups]
