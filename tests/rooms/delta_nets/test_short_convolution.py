"""Short convolutions of each channel against MLX's own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from nested_core.backend import to_float
from nested_core.rooms.delta_nets.short_convolution import using_short_convolutions


class Layers(nn.Module):
    """A model of one convolution."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, **{"kernel_size": 4, "groups": 6, "bias": False} | settings)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"kernel_size": 2}], ids=str)
@pytest.mark.parametrize("length", [4, 19])
def test_output_and_gradients_are_those_of_mlx(length: int, settings: dict[str, Any]) -> None:
    mx.random.seed(0)
    model = Layers(**settings)
    x = mx.random.normal((3, length, 6))
    g = mx.random.normal(model(x).shape)

    def outputs() -> list[mx.array]:
        def run(x: mx.array, weight: mx.array) -> mx.array:
            model.conv.weight = weight
            return model(x)

        given = [x, model.conv.weight]
        found, gradients = mx.vjp(run, given, [g])
        model.conv.weight = given[1]
        return [*found, *gradients]

    expected = outputs()
    with using_short_convolutions(model):
        assert model.conv.__class__ is not nn.Conv1d
        found = outputs()
    assert model.conv.__class__ is nn.Conv1d
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert to_float(mx.abs(ours - theirs).max()) <= 2e-6 * to_float(mx.abs(theirs).max())


@pytest.mark.parametrize(
    "settings",
    [{"groups": 1}, {"groups": 3}, {"stride": 2}, {"padding": 1}, {"dilation": 2}]
    + [{"kernel_size": 9}],
    ids=str,
)
def test_other_convolutions_stay_mlxs(settings: dict[str, Any]) -> None:
    model = Layers(**settings)
    with using_short_convolutions(model):
        assert model.conv.__class__ is nn.Conv1d
