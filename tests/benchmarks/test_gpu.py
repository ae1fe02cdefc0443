"""The GPU harness where there is none: its shapes agree, and a bound counts what a step must do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.gpu import floor, shapes
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
