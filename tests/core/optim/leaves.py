"""Trees of arrays for tests: random values, and every leaf as its bytes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten


def values(seed: int) -> dict[str, Any]:
    """Random values of two layers; the same for the same seed."""
    random = np.random.default_rng(seed)
    shapes = {"fast": (3, 2), "slow": (2, 4)}
    return {name: mx.array(random.normal(size=shape), mx.float32) for name, shape in shapes.items()}


def bits(tree: Any) -> dict[str, bytes]:
    """The bytes of every leaf."""
    return {name: np.array(leaf).tobytes() for name, leaf in dict(tree_flatten(tree)).items()}
