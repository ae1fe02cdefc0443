"""The exponential against numpy's in float64."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from nested_core.kernels.exponential import exponential


def test_the_exponential_is_right_within_the_rounding_of_its_argument() -> None:
    x = mx.concatenate([mx.linspace(-80, 80, 10_001), mx.array([-math.inf, 0.0, math.inf])])
    exact, found = np.exp(np.array(x).astype(np.float64)), np.array(exponential(x))
    assert found[-3:].tolist() == [0.0, 1.0, math.inf]
    units = np.abs(found[:-3] / exact[:-3] - 1) / np.finfo(np.float32).eps
    assert (units <= np.abs(np.array(x[:-3])) + 1).all()
