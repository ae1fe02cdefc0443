"""Rows of like length put together, under the widths that cost least in padding and traces.

`mx.compile` keeps one trace for each width, and each row is padded to one: the widths are chosen
from the data's own lengths, so that no other choice costs less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nested_core.data.array_types import Int32, Int64

MAX_DISTINCT_WIDTHS = 96
# What a width costs once, in positions of a batch: its trace, and the plans and memory of a GPU.
POSITIONS_PER_TRACE = 6_000
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
    longest = _round_up_widths(needed[rows[::batch_size]])
    if max_seq_length is not None:
        longest = longest.clip(max=max_seq_length)
    longest = widen_to_fast_widths(longest)
    tokens = int(needed.sum())
    widths, counts = np.unique(longest, return_counts=True)
    passes = max(1.0, MIN_BATCHES_COUNTED / len(longest))
    chosen = choose_padded_widths(widths, counts, POSITIONS_PER_TRACE / batch_size / passes)
    places = np.searchsorted(chosen, longest)  # of each batch, the narrowest width that holds it
    firsts = np.flatnonzero(np.diff(places, prepend=-1))
    starts = np.append(firsts * batch_size, len(rows)).astype(np.int64)
    padded = int(chosen[places].sum()) * batch_size
    return LengthBuckets(rows, starts, chosen[places[firsts]], batch_size, 1 - tokens / padded)


def widen_to_fast_widths(widths: Int64) -> Int64:
    """Each width, or the next multiple of 128 where that is at most 4 % more; even in any case.

    Our kernels take even numbers of positions alone.
    """
    fast = -(-widths // FAST_WIDTH_MULTIPLE) * FAST_WIDTH_MULTIPLE
    is_near = fast <= widths * (1 + MAX_PADDING_TO_FAST_WIDTH)
    widened: Int64 = np.where(is_near, fast, widths + widths % 2)
    return widened


def _round_up_widths(needed: Int64) -> Int64:
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
    cost, before = (widths * done).astype(np.float64), list[Int64]()
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
