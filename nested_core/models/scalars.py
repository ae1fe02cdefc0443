"""A zero-dimensional MLX array as a Python number; this waits for the device."""

from __future__ import annotations

from typing import cast

import mlx.core as mx


def to_float(value: mx.array) -> float:
    """The value as a float; float32 and narrower are exact."""
    return float(cast(float, value.item()))


def to_int(value: mx.array) -> int:
    """The value as an int."""
    return int(cast(int, value.item()))
