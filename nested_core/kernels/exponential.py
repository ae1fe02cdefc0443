"""exp(x) computed in the fastest way on this device: as 2 ** (x log2 e) on x86 CPUs.

MLX's own exp calls a function for each fused multiply-add there, and takes twice as long as the C
library's power of two. Do not differentiate through it; its callers use the known derivative.
"""

from __future__ import annotations

import math
import platform
from functools import cache

import mlx.core as mx

from nested_core import backend


def exponential(x: mx.array) -> mx.array:
    """Compute exp(x) in float32.

    2 ** (x log2 e) is right within |x| + 1 units in the last place.
    """
    return mx.power(2.0, x * math.log2(math.e)) if _has_slow_exp() else mx.exp(x)


@cache
def _has_slow_exp() -> bool:
    """Return whether MLX computes on an x86 CPU, where its exp is slow."""
    return backend.device() == "cpu" and platform.machine() in ("x86_64", "AMD64")
