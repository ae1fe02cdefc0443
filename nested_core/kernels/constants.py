"""Numbers that a kernel reads."""

from __future__ import annotations

from functools import cache

import mlx.core as mx

LEAST = 4  # numbers: MLX keeps what has 8 bytes or less where the host has it too


@cache
def constant(values: tuple[float, ...]) -> mx.array:
    """Numbers, again and again where they are few, in the device's memory.

    An array that is made from Python's numbers lies in the host's, and every block of a kernel
    would read it from there.
    """
    array = mx.array(values * -(-LEAST // len(values))) + 0
    mx.eval(array)
    return array
