"""Which replayed row comes when: a function of the seed and of how many came before.

Under `uniform` all rows are one group, which is gone through again and again, in another order each
time. Under `recent` each source is a group, and each of its rows comes half as often as a row of
the next newer source: of a source of age a (0 is the newest) with n rows, the share of the draws is
n / 2^a, over the sum of that. Groups take turns by the golden-ratio sequence, so that after any
number of draws each has its share to within a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Weighting = Literal["uniform", "recent"]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_CHOICE = 2**62  # in place of an epoch, for the permutation that chooses rows


def choose_rows(
    sources: Int64, rows: Sequence[int], draws: int, weighting: Weighting, seed: int
) -> Int64:
    """Return the indices of the rows that a run replays, ascending.

    As many rows of a group are chosen, at random, as the group has draws, or all of them.

    Args:
        sources: the age of each row's source, 0 for the newest, ascending, int64 [n].
        rows: the number of rows of each source, by age.
        draws: the number of rows that the run mixes in; a row that comes twice counts twice.
        weighting: how draws are shared between the sources, see the module.
        seed: the run's seed.
    """
    groups = sources if weighting == "recent" else np.zeros_like(sources)
    shares = _share_draws(rows, weighting)
    counts = np.bincount(_take_turns(shares, draws), minlength=len(shares))
    chosen = [
        _permute(np.flatnonzero(groups == group), seed, _CHOICE)[:count]
        for group, count in enumerate(counts)
    ]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *chosen]))


def draw_rows(
    sources: Int64, rows: Sequence[int], draws: int, weighting: Weighting, seed: int
) -> Int32:
    """Return the index of the row that comes at each draw, int32 [draws].

    A group's rows come in a random order, and in another one each time that all have come.

    The arguments are those of `choose_rows`, but `sources` has the rows that were chosen, at least
    one.
    """
    groups = sources if weighting == "recent" else np.zeros_like(sources)
    shares = _share_draws(rows, weighting)
    shares[np.bincount(groups, minlength=len(shares)) == 0] = 0.0  # none could be tokenised
    turns = _take_turns(shares, draws)
    drawn = np.zeros(draws, np.int32)
    for group in np.unique(groups):
        members, draws_of_group = np.flatnonzero(groups == group), np.flatnonzero(turns == group)
        rounds = range(-(-len(draws_of_group) // len(members)))  # rounded up
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
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(rows)
