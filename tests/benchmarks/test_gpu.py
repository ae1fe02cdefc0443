"""The GPU harness where there is none: its shapes agree, and a bound counts what a step must do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.gpu import floor, shapes


@pytest.mark.parametrize("size", shapes.SHAPES)
def test_the_floor_has_every_weight_of_the_model_it_bounds(size: str) -> None:
    shape = shapes.SHAPES[size]
    layer = sum(math.prod(weight) for weight in floor.weights_of(shape))
    assert shape.layers * layer + shape.vocabulary * shape.hidden == shape.weights


def test_the_floor_is_measured_in_as_many_windows_as_a_training() -> None:
    found = floor.floor_of(shapes.SHAPES["tiny"])
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
