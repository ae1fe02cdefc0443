"""Batches with replay: an epoch has each new row once and its share of earlier ones, no state."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.padding import skewed_lengths
from nested_core.data.batches import BatchOrder
from nested_core.rooms.replay.replayed_batches import (
    ReplayedBatchOrder,
    Weighting,
    choose_rows,
    draw_rows,
)

lengths_lists = st.lists(st.integers(1, 300), min_size=1, max_size=50)
fractions = st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.3, 0.5, 0.9])


def make_order(
    new: list[int], replayed: list[int], batch_size: int, fraction: float, seed: int = 3
) -> ReplayedBatchOrder:
    sources = np.zeros(len(replayed), np.int64)
    draw = partial(draw_rows, sources, (len(replayed),), weighting="uniform", seed=seed)
    return ReplayedBatchOrder(
        np.array(new),
        np.array(replayed),
        fraction,
        draw,
        batch_size=batch_size,
        seed=seed,
        max_seq_length=300,
    )


@settings(max_examples=40)
@given(lengths_lists, lengths_lists, st.integers(1, 9), fractions)
def test_an_epoch_has_each_new_row_once_and_the_fraction_replayed(
    new: list[int], replayed: list[int], batch_size: int, fraction: float
) -> None:
    order = make_order(new, replayed, batch_size, fraction)
    longest = np.array(new + replayed) - 1
    batches = order.count_batches(1)
    for epoch in range(3):
        of_epoch = [order.batch(epoch * batches + index) for index in range(batches)]
        rows = np.concatenate([batch.rows for batch in of_epoch])
        assert sorted(rows[rows < len(new)]) == list(range(len(new)))
        earlier = len(rows) - len(new)
        assert earlier == max(1, round(len(new) * fraction / (1 - fraction)))
        assert sorted(len(batch.rows) for batch in of_epoch)[1:] == [batch_size] * (batches - 1)
        for batch in of_epoch:
            assert batch.width in order.buckets.widths
            assert longest[batch.rows].max() <= batch.width


@settings(max_examples=40)
@given(lengths_lists, lengths_lists, st.integers(1, 9), fractions)
def test_replayed_rows_come_equally_often(new, replayed, batch_size, fraction) -> None:
    order = make_order(new, replayed, batch_size, fraction)
    rows = np.concatenate([order.batch(index).rows for index in range(order.count_batches(2))])
    counts = np.bincount(rows[rows >= len(new)] - len(new), minlength=len(replayed))
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_replayed_rows_are_spread_over_the_batches_of_a_width(fraction: float) -> None:
    order = make_order([100] * 96, [100] * 40, 8, fraction)
    for index in range(order.count_batches(2)):
        earlier = int((order.batch(index).rows >= 96).sum())
        assert abs(earlier - 8 * fraction) <= 1


def test_a_batch_is_a_function_of_its_position() -> None:
    lengths = skewed_lengths(200).clip(max=300).tolist()
    first, again = (make_order(lengths[:150], lengths[150:], 4, 0.1) for _ in range(2))
    straight = [first.batch(index) for index in range(120)]
    for index in [119, 3, 77, 40, 0]:
        batch = again.batch(index)
        assert batch.width == straight[index].width
        np.testing.assert_array_equal(batch.rows, straight[index].rows)
    other = make_order(lengths[:150], lengths[150:], 4, 0.1, seed=4)
    assert any(set(other.batch(n).rows) != set(straight[n].rows) for n in range(10))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_largest_sums_are_those_of_the_first_epoch(ranks: int) -> None:
    lengths = skewed_lengths(90).clip(max=300).tolist()
    order = make_order(lengths[:70], lengths[70:], 4, 0.3)
    values = np.arange(90)
    largest: dict[int, int] = {}
    for index in range(order.count_batches(1)):
        batch = order.batch(index)
        own = int(values[batch.rows[1::2] if ranks == 2 else batch.rows].sum())
        largest[batch.width] = max(own, largest.get(batch.width, 0))
    assert order.largest_sums(values, ranks - 1, ranks) == largest


def test_padding_is_about_what_it_is_without_replay() -> None:
    lengths = skewed_lengths(4000).clip(max=300)
    new, replayed = lengths[:3000], lengths[3000:]
    order = make_order(list(map(int, new)), list(map(int, replayed)), 8, 0.1)
    batches = [order.batch(index) for index in range(order.count_batches(1))]
    needed = np.maximum(np.concatenate([new, replayed]) - 1, 0)
    tokens = sum(int(needed[batch.rows].sum()) for batch in batches)
    padded = sum(batch.width * 8 for batch in batches)
    without = BatchOrder(new, 8, 3, max_seq_length=300).buckets.padding_share
    assert 1 - tokens / padded <= without + 0.025


def draw(rows: tuple[int, ...], draws: int, weighting: Weighting) -> Any:
    sources = np.repeat(np.arange(len(rows)), rows)
    return sources[draw_rows(sources, rows, draws, weighting, 5)]


def test_recent_gives_each_row_half_the_draws_of_one_a_generation_newer() -> None:
    counts = np.bincount(draw((40, 20, 40), 7000, "recent"))
    assert (np.abs(counts - 7000 * np.array([4, 1, 1]) / 6) <= 3).all()
    assert (np.bincount(draw((40, 20, 40), 5000, "uniform")) == [2000, 1000, 2000]).all()


def test_a_shorter_run_draws_the_first_of_a_longer_one() -> None:
    assert (draw((5, 9), 300, "recent")[:100] == draw((5, 9), 100, "recent")).all()


@pytest.mark.parametrize("weighting", ["uniform", "recent"])
def test_as_many_rows_are_chosen_as_the_run_has_room_for(weighting: Weighting) -> None:
    rows = (30, 0, 30)
    chosen = choose_rows(rows, 25, weighting, 5)
    counts = [len({*own.tolist()} & {*range(size)}) for own, size in zip(chosen, rows, strict=True)]
    assert sum(counts) == sum(map(len, chosen)) == 25
    if weighting == "recent":
        assert counts == [20, 0, 5]
    assert [len(own) for own in choose_rows(rows, 10_000, weighting, 5)] == [30, 0, 30]
    assert [len(own) for own in choose_rows(rows, 0, weighting, 5)] == [0, 0, 0]
    assert choose_rows((), 10, weighting, 5) == []


def test_a_source_of_which_nothing_could_be_tokenised_leaves_its_share_to_the_others() -> None:
    sources = np.array([0, 0, 2])
    counts = np.bincount(sources[draw_rows(sources, (2, 5, 4), 300, "recent", 5)], minlength=3)
    assert counts[1] == 0
    assert counts.sum() == 300
