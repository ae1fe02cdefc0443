"""Rows of like length put together, under as few widths as keep padding low.

`mx.compile` keeps one trace for each width, and each row is padded to one: the widths are chosen
from the data's own lengths, so that no other choice of so many pads less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nested_core.data.tokens.tokenized_split import Int32, Int64

MAX_DISTINCT_WIDTHS = 96
TARGET_PADDING_SHARE = 0.0275  # below this share one more width costs more than it saves
MAX_PADDING_FACTOR_OVER_BEST = 1.05  # where the target is out of reach, as with few rows
WIDTHS_PER_OCTAVE = 64
_IMPOSSIBLE_COST = 2**62


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
    tokens = int(needed.sum())
    widths, counts = np.unique(longest, return_counts=True)
    chosen = choose_padded_widths(widths, counts, tokens / batch_size)
    places = np.searchsorted(chosen, longest)  # of each batch, the narrowest width that holds it
    firsts = np.flatnonzero(np.diff(places, prepend=-1))
    starts = np.append(firsts * batch_size, len(rows)).astype(np.int64)
    padded = int(chosen[places].sum()) * batch_size
    return LengthBuckets(rows, starts, chosen[places[firsts]], batch_size, 1 - tokens / padded)


def _round_up_widths(needed: Int64) -> Int64:
    """Every width up to 128, multiples of 2 up to 256, of 4 up to 512, and so on.

    Long widths are multiples that kernels like, and no more than 64 an octave are chosen from.
    """
    needed = np.maximum(needed, 1)
    octave = np.int64(1) << (np.frexp(needed - 0.5)[1].astype(np.int64) - 1).clip(0)
    step = np.maximum(octave // WIDTHS_PER_OCTAVE, 1)
    widths: Int64 = (needed + step - 1) // step * step
    return widths


def choose_padded_widths(widths: Int64, counts: Int64, tokens: float) -> Int64:
    """The fewest of these ascending widths under which the padding share is low enough.

    `counts` are the batches that need each width, `tokens` what they hold at most a row. With k
    widths, the last of them widths[j], the least padded length of all batches up to j is
    cost[k][j] = min over i < j of cost[k - 1][i] + widths[j] * (batches after i, up to j).
    """
    done = np.cumsum(counts)
    least = int((widths * counts).sum())
    share = max(TARGET_PADDING_SHARE, MAX_PADDING_FACTOR_OVER_BEST * (1 - tokens / least))
    allowed = max(least, tokens / (1 - share) if share < 1 else np.inf)
    cost, before = widths * done, list[Int64]()
    is_after = np.tri(len(widths), dtype=bool)  # i >= j
    while cost[-1] > allowed and len(before) + 1 < MAX_DISTINCT_WIDTHS:
        options = np.where(is_after, _IMPOSSIBLE_COST, cost[:, None] - widths * done[:, None])
        before.append(options.argmin(axis=0))
        cost = np.minimum(cost, widths * done + options.min(axis=0))
    last, chosen = len(widths) - 1, [len(widths) - 1]
    for step in reversed(before):
        if last == 0:
            break
        last = int(step[last])
        chosen.append(last)
    narrowest_first: Int64 = widths[chosen[::-1]]
    return narrowest_first
