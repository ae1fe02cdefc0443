"""Batches follow from lengths, seed and index; each example is in one of them an epoch."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tuner.datasets import CacheDataset

from benchmarks import padding
from benchmarks.padding import skewed_lengths
from nested_core import backend
from nested_core.data.batches import (
    MAX_DISTINCT_WIDTHS,
    BatchOrder,
    BatchRows,
    choose_evaluation_batches,
    choose_padded_widths,
    make_batch_arrays,
    sort_into_buckets,
    widen_to_fast_widths,
)
from nested_core.data.tokens.tokenized_split import TokenizedSplit

lengths_lists = st.lists(st.integers(1, 700), min_size=1, max_size=60)
batch_sizes = st.integers(1, 9)
seeds = st.integers(0, 2**32)


def split_of(lengths: list[int], learnt: list[bool] | None = None) -> TokenizedSplit:
    """Examples whose tokens are 1, 2, 3, ... through all of them, never the pad token 0."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, starts[-1] + 1, dtype=np.int32)
    supervised = np.resize([True] if learnt is None else learnt, len(tokens))
    supervised[starts[:-1]] = False
    lines = np.arange(1, len(lengths) + 1, dtype=np.int32)
    return TokenizedSplit(tokens, supervised, starts, lines, lines.astype(np.uint64))


@given(lengths_lists, batch_sizes, seeds, st.integers(0, 5))
def test_each_example_is_used_once_an_epoch(lengths, batch_size, seed, epoch) -> None:
    plan = BatchOrder(lengths, batch_size, seed)
    first = epoch * plan.batches_per_epoch
    batches = [plan.batch(first + index) for index in range(plan.batches_per_epoch)]
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(len(lengths)))
    sizes = sorted(len(batch.rows) for batch in batches)
    assert sizes[1:] == [batch_size] * (len(sizes) - 1)


@given(lengths_lists, batch_sizes, seeds)
def test_shapes_come_from_the_fixed_set_and_hold_every_token(lengths, batch_size, seed) -> None:
    split = split_of(lengths)
    plan = BatchOrder(split.lengths, batch_size, seed, max_seq_length=700)
    seen = 0
    for index in range(plan.batches_per_epoch):
        tokens, supervised = plan.arrays(split, index)
        assert tokens.shape[0] == batch_size
        assert tokens.shape[1] - 1 in plan.buckets.widths
        assert tokens.shape[1] - 1 <= 700 * 1.04
        assert tokens.dtype == np.int32
        assert supervised.dtype == np.bool_
        assert supervised.shape == (batch_size, tokens.shape[1] - 1)
        seen += int(tokens.astype(np.int64).sum())
    assert seen == int(split.tokens.astype(np.int64).sum())


@given(lengths_lists, batch_sizes, seeds, st.lists(st.booleans(), min_size=1, max_size=90))
def test_the_mask_selects_the_supervised_targets_and_never_a_pad_token(
    lengths: list[int], batch_size: int, seed: int, learnt: list[bool]
) -> None:
    split = split_of(lengths, learnt)
    plan = BatchOrder(split.lengths, batch_size, seed)
    expected = split.tokens[split.target_mask]
    found = []
    for index in range(plan.batches_per_epoch):
        tokens, supervised = plan.arrays(split, index)
        found.append(tokens[:, 1:][supervised])
    assert sorted(np.concatenate(found)) == sorted(expected)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=7, unique=True),
    st.lists(st.integers(1, 9), min_size=7, max_size=7),
    st.floats(0.0, 300.0),
)
def test_no_other_choice_of_widths_costs_less(widths, counts, cost_of_width) -> None:
    needed, batches = np.sort(np.array(widths)) * 4, np.array(counts[: len(widths)])
    found = choose_padded_widths(needed, batches, cost_of_width)

    def cost(chosen: tuple[int, ...]) -> float:
        padded = np.array(chosen)[np.searchsorted(chosen, needed)] @ batches
        return float(padded + cost_of_width * len(chosen))

    others = [
        (*other, needed[-1])
        for count in range(len(needed))
        for other in combinations(needed[:-1].tolist(), count)
    ]
    assert cost(tuple(found)) == pytest.approx(min(map(cost, others)))


@given(lengths_lists, batch_sizes)
def test_a_bucket_holds_whole_batches_and_every_row_fits_into_its_width(
    lengths: list[int], batch_size: int
) -> None:
    buckets = sort_into_buckets(lengths, batch_size)
    assert sorted(buckets.rows) == list(range(len(lengths)))
    assert (buckets.starts[:-1] % batch_size == 0).all()
    assert (np.diff(buckets.widths) < 0).all()
    for place, row in enumerate(buckets.rows):
        assert lengths[row] - 1 <= buckets.bucket_width_at(place)
    batches = range(0, len(lengths), batch_size)
    positions = batch_size * sum(buckets.bucket_width_at(start) for start in batches)
    assert buckets.padding_share == 1 - (sum(lengths) - len(lengths)) / positions


def test_widths_are_even_or_a_near_multiple_of_128_and_little_wider_than_allowed() -> None:
    every = np.repeat(np.arange(1, 2049), 10)
    buckets = sort_into_buckets(every, 8, 2048)
    assert len(buckets.widths) <= MAX_DISTINCT_WIDTHS
    assert (buckets.widths % 2 == 0).all()
    assert (buckets.widths[buckets.widths > 1024] % 16 == 0).all()
    found = widen_to_fast_widths(
        np.array([1, 19, 123, 124, 127, 129, 136, 492, 493, 511, 700, 2040])
    )
    assert found.tolist() == [2, 20, 124, 128, 128, 130, 136, 492, 512, 512, 700, 2048]
    assert sort_into_buckets([2048], 1, 2040).widths.tolist() == [2048]
    assert sort_into_buckets([700], 1, 700).widths.tolist() == [700]
    assert sort_into_buckets([20] * 64, 4).widths.tolist() == [20]


def test_on_cuda_widths_are_fewer_for_mlx_keeps_the_memory_of_each(monkeypatch) -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 0.6, 2_400).clip(12, 512)
    here = sort_into_buckets(lengths, 4, 512)
    monkeypatch.setattr(backend, "is_mlx_built_for_cuda", lambda: True)
    there = sort_into_buckets(lengths, 4, 512)
    assert (len(here.widths), len(there.widths)) == (12, 4)
    assert here.padding_share < 0.06 < there.padding_share < 0.16


@pytest.mark.usefixtures("own_random_state")  # mlx_lm draws from numpy's
@pytest.mark.parametrize(
    ("rows", "most_widths", "most_padding"),
    [(2_000, 30, 0.07), pytest.param(20_000, 45, 0.045, marks=pytest.mark.slow("20,000 rows"))],
)
def test_skewed_lengths_have_few_widths_and_little_padding(rows, most_widths, most_padding) -> None:
    lengths = skewed_lengths(rows)
    found = padding.ours(lengths)
    assert found.share <= most_padding
    assert found.shapes <= most_widths
    expected = sort_into_buckets(lengths, padding.BATCH_SIZE, padding.MAX_SEQ_LENGTH).padding_share
    assert found.share == pytest.approx(expected, abs=1e-12)
    assert padding.theirs(CacheDataset(padding._Examples(lengths))).share > 0.6


@given(st.lists(st.integers(0, 9), max_size=9), st.lists(st.booleans(), min_size=1, max_size=9))
def test_supervised_tokens_are_counted_by_example(lengths: list[int], learnt: list[bool]) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mask = np.resize(learnt, starts[-1])
    lines = np.arange(len(lengths), dtype=np.int32)
    split = TokenizedSplit(
        np.zeros(starts[-1], np.int32), mask, starts, lines, lines.astype(np.uint64)
    )
    expected = [int(split.example_mask(row).sum()) for row in range(len(split))]
    assert split.count_supervised().tolist() == expected


@given(lengths_lists, batch_sizes, st.integers(1, 3))
def test_the_largest_sum_of_each_width_is_that_of_a_batch_of_the_first_epoch(
    lengths: list[int], batch_size: int, ranks: int
) -> None:
    plan, values = BatchOrder(lengths, batch_size, 0), np.arange(len(lengths))
    for rank in range(ranks):
        sums: dict[int, int] = {}
        for index in range(plan.batches_per_epoch):
            batch = plan.batch(index)
            own = int(values[batch.rows][rank::ranks].sum())
            sums[batch.width] = max(own, sums.get(batch.width, 0))
        assert plan.largest_sums(values, rank, ranks) == sums


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_epochs_and_seeds_differ(seed: int) -> None:
    lengths = [20] * 64
    plan, other = BatchOrder(lengths, 4, seed), BatchOrder(lengths, 4, seed + 1)
    orders = [
        [row for index in range(16) for row in some.batch(epoch * 16 + index).rows]
        for some, epoch in ((plan, 0), (plan, 1), (other, 0))
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert {frozenset(plan.batch(i).rows) for i in range(16)} != {
        frozenset(plan.batch(16 + i).rows) for i in range(16)
    }


FINGERPRINT = """
import hashlib, numpy as np
from nested_core import backend
from nested_core.data.batches import BatchOrder
plan = BatchOrder(np.random.default_rng(5).integers(2, 900, 333), 8, 42)
batches = [plan.batch(index) for index in {order}]
print(hashlib.sha256(repr([(b.rows.tolist(), b.width) for b in batches]).encode()).hexdigest())
"""


def test_the_same_index_gives_the_same_batch_in_a_fresh_process() -> None:
    plan = BatchOrder(np.random.default_rng(5).integers(2, 900, 333), 8, 42)
    order = [200, 3, 41, 42, 3]
    batches = [plan.batch(index) for index in order]
    text = repr([(batch.rows.tolist(), batch.width) for batch in batches])
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FINGERPRINT.format(order=order)],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == hashlib.sha256(text.encode()).hexdigest()


@given(lengths_lists, batch_sizes)
def test_evaluation_uses_every_row_in_order_of_length(lengths: list[int], batch_size: int) -> None:
    split = split_of(lengths)
    batches = choose_evaluation_batches(split, batch_size)
    rows = np.concatenate([batch.rows for batch in batches])
    assert sorted(rows) == list(range(len(lengths)))
    assert (np.diff(split.lengths[rows]) <= 0).all()
    for batch in batches:
        tokens, supervised = make_batch_arrays(split, batch, batch_size)
        assert tokens.shape == (batch_size, batch.width + 1)
        assert not supervised[len(batch.rows) :].any()


@given(lengths_lists, batch_sizes, st.integers(0, 30))
def test_a_limited_evaluation_is_fixed_and_spread(lengths, batch_size, limit) -> None:
    split = split_of(lengths)
    everything = choose_evaluation_batches(split, batch_size)
    some = choose_evaluation_batches(split, batch_size, limit)
    again = choose_evaluation_batches(split, batch_size, limit)
    assert len(some) == min(limit, len(everything))
    assert [batch.rows.tolist() for batch in some] == [batch.rows.tolist() for batch in again]
    rows = [row for batch in some for row in batch.rows]
    assert len(set(rows)) == len(rows)
    places = [[b.rows.tolist() for b in everything].index(batch.rows.tolist()) for batch in some]
    if len(some) < len(everything):
        assert places == [(2 * i + 1) * len(everything) // (2 * limit) for i in range(limit)]


@pytest.mark.parametrize("limit", [1, 3, 10, 25])
def test_a_limited_evaluation_measures_what_a_whole_one_does(limit: int) -> None:
    """Where losses fall with the length: with both ends chosen, 25 of 200 were off by 0.08."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.9, 0.8, 800).astype(int), 8, 2048)
    split = split_of(lengths.tolist())

    def loss_of(batches: list[BatchRows]) -> float:
        rows = np.concatenate([batch.rows for batch in batches])
        return float(np.average(3 - 0.3 * np.log(lengths[rows]), weights=lengths[rows] - 1))

    whole = loss_of(choose_evaluation_batches(split, 4))
    bound = {1: 0.2, 3: 0.08, 10: 0.04, 25: 0.02}[limit]
    assert loss_of(choose_evaluation_batches(split, 4, limit)) == pytest.approx(whole, abs=bound)


def test_a_plan_without_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        BatchOrder([], 4, 0)


def test_an_example_without_tokens_is_a_row_without_targets() -> None:
    """A chat template may write nothing."""
    split = TokenizedSplit(
        tokens=np.arange(1, 5, dtype=np.int32),
        target_mask=np.array([False, True, True, True]),
        starts=np.array([0, 4, 4]),
        lines=np.array([1, 2], np.int32),
        contents=np.array([1, 2], np.uint64),
    )
    tokens, target_mask = make_batch_arrays(split, BatchRows(np.array([0, 1], np.int32), 3), 2)
    assert tokens.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]
    assert target_mask.tolist() == [[True] * 3, [False] * 3]
    assert len(split.example(1)) == 0
