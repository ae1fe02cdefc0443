"""The GPU harness where there is none: its shapes agree, and a bound counts what a step must do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import floor, mlx_arms, shapes
from benchmarks.tiers import depths, thirds


@pytest.mark.parametrize("size", shapes.SHAPES)
def test_the_floor_has_every_weight_of_the_model_it_bounds(size: str) -> None:
    shape = shapes.SHAPES[size]
    layer = sum(math.prod(weight) for weight in floor.weights_of(shape))
    assert shape.layers * layer + shape.vocabulary * shape.hidden == shape.weights


@pytest.mark.parametrize("layers", [shape.layers for shape in shapes.SHAPES.values()])
def test_the_floor_goes_back_as_far_as_the_thirds_that_are_due(layers: int) -> None:
    refs: Any = {f"model.layers.{place}.a": None for place in range(layers)}
    tiers = thirds(refs, layers, deep=True)
    for step, lowest in enumerate(floor.lowest_layers(layers, deep=True), 1):
        due = [at for name, at in depths(refs).items() if tiers.tensors[name] in tiers.due(step)]
        assert min(due) == lowest
    assert floor.lowest_layers(layers, deep=False) == [0] * shapes.WINDOW


@pytest.mark.parametrize("deep", [False, True])
def test_the_floor_is_measured_in_as_many_windows_as_a_training(deep: bool) -> None:
    found = floor.floor_of(shapes.SHAPES["tiny"], deep=deep)
    assert len(found["seconds"]) == shapes.WINDOWS
    assert min(found["seconds"]) > 0


def test_the_energy_of_a_step_is_what_the_counter_gained_over_the_windows_that_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = 0

    def window() -> None:
        nonlocal done
        done += 1

    monkeypatch.setattr(shapes, "energy", lambda: 12.0 * done)
    assert shapes.measure(window)["joules"] == 12 / shapes.WINDOW


def test_without_a_counter_no_energy_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "energy", lambda: None)
    found: dict[str, Any] = shapes.measure(lambda: None)
    assert found["joules"] is None


@pytest.mark.parametrize("word", shapes.ROWS)
def test_even_rows_have_as_many_tokens_as_those_of_unlike_lengths(word: str) -> None:
    found, even = shapes.rows_of({word}, 512), shapes.rows_of({word, "even"}, 512)
    assert found is not None
    assert even is not None
    for mixed, same in zip(found, even, strict=True):
        assert len(set(mixed.tolist())) > 50
        assert len(set(same.tolist())) == 1
        assert same.mean() == pytest.approx(mixed.mean(), abs=0.5)
    lengths, learnt = found
    assert (learnt >= 1).all()
    assert (learnt < lengths).all()
    assert lengths.max() == 512
    assert shapes.rows_of({"deep"}, 512) is None


@pytest.mark.parametrize("word", shapes.ROWS)
def test_a_batch_of_unlike_rows_learns_their_ends_and_counts_no_padding(word: str) -> None:
    class Loss:
        def for_position_counts(self, counts: dict[int, int]) -> Any:
            return counts

    shape = shapes.SHAPES["tiny"]
    generator = np.random.default_rng(0)
    batches, real, counts = mlx_arms.draw_batches({word}, shape, Loss(), generator)
    assert len(batches) == len(real) == shapes.WINDOW * 2 * shapes.MIXED_WARM
    for (tokens, mask), count in zip(batches, real, strict=True):
        rows, width = mask.shape
        assert tokens.shape == (rows, width + 1)
        last = [int(np.flatnonzero(row).max(initial=-1)) + 1 for row in mask]
        assert count == sum(last)  # a row's last token is learnt
        assert mask.sum() <= counts[width]
        assert all(np.diff(np.flatnonzero(row)).max(initial=1) == 1 for row in mask)
