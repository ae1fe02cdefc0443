"""The GPU harness where there is none: its shapes agree, and a bound counts what a step must do."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import equality, floor, mlx_arms, shapes
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


@pytest.mark.slow("trains for its windows")
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
    found = shapes.rows_of({word: "1"}, 512)
    even = shapes.rows_of({word: "1", "even": "1"}, 512)
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
    assert shapes.rows_of({"deep": "1"}, 512) is None


@pytest.mark.parametrize("word", shapes.ROWS)
def test_even_rows_have_the_number_of_tokens_that_an_arm_names(word: str) -> None:
    found, even = shapes.rows_of({word: ""}, 512), shapes.rows_of({word: "", "even": "90"}, 512)
    assert found is not None
    assert even is not None
    assert set(even[0].tolist()) == {90}
    (learnt,) = set(even[1].tolist())
    assert learnt / 90 == pytest.approx(found[1].mean() / found[0].mean(), abs=0.02)
    assert learnt < 90


@pytest.mark.parametrize("word", shapes.ROWS)
def test_a_batch_of_unlike_rows_learns_their_ends_and_counts_no_padding(word: str) -> None:
    class Loss:
        def for_position_counts(self, counts: dict[int, int]) -> Any:
            return counts

    shape = shapes.SHAPES["tiny"]
    generator = np.random.default_rng(0)
    batches, real, counts = mlx_arms.draw_batches({word: "1"}, shape, Loss(), generator)
    assert len(batches) == len(real) == shapes.WINDOW * 2 * shapes.MIXED_WARM
    for (tokens, mask), count in zip(batches, real, strict=True):
        rows, width = mask.shape
        assert tokens.shape == (rows, width + 1)
        last = [int(np.flatnonzero(row).max(initial=-1)) + 1 for row in mask]
        assert count == sum(last)  # a row's last token is learnt
        assert mask.sum() <= counts[width]
        assert all(np.diff(np.flatnonzero(row)).max(initial=1) == 1 for row in mask)


@pytest.mark.slow("compiles two training steps")
@pytest.mark.usefixtures("own_random_state")  # mlx_lm's progress bar draws from it
def test_losses_over_rows_of_mixed_lengths_are_those_of_mlx_lms_own_training_loop() -> None:
    shape, steps = replace(shapes.SHAPES["tiny"], batch=4), 8
    batches = equality.draw(shape, (12, 20, 30))
    assert {mask.shape[1] for _, mask in batches[:steps]} == {12, 20, 30}
    ours = np.array(list(equality.our_losses(shape, batches, steps)))
    exact = equality.mlx_lm_losses(shape, batches, steps, loss_in_float32=True)
    assert ours == pytest.approx(np.array(exact), rel=1e-3)
    assert ours[-1] < ours[0]  # or nothing is learnt, and equal steps would say nothing
    fewer = [(tokens, mask & (np.arange(mask.shape[1]) > 0)) for tokens, mask in batches]
    others = np.array(list(equality.our_losses(shape, fewer, steps)))
    assert np.abs(others / ours - 1).max() > 1e-3


def test_how_far_losses_are_apart_is_a_share_of_mlx_lms(capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(size="tiny", widths=[12])
    equality.compare(options, "ours", [2.0, 4.0, 3.03, 9.0], [2.0, 4.0, 3.0])
    row = json.loads(capsys.readouterr().out)
    assert row["steps"] == 3
    assert row["worst"] == pytest.approx(0.01)
    assert (row["first_step"], row["median"]) == (0, 0)
    assert row["mean"] == pytest.approx(0.01 / 3)
