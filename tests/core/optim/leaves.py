"""What tests of optimizers share: random trees, every leaf as its bytes, steps and their counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import optimizers
from mlx.utils import tree_flatten

OPTIMIZERS = {
    "sgd": lambda: optimizers.SGD(1e-2, momentum=0.9),
    "muon": lambda: optimizers.Muon(1e-2),
    "adafactor": lambda: optimizers.Adafactor(1e-2),
}
SHAPES = {"fast": (3, 2), "slow": (2, 4)}


def values(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Any]:
    """Random values of some layers; the same for the same seed."""
    random = np.random.default_rng(seed)
    return {name: mx.array(random.normal(size=shape), mx.float32) for name, shape in shapes.items()}


def bits(tree: Any) -> dict[str, Any]:
    """Dtype, shape and bytes of every leaf; bfloat16 widens to float32 exactly."""
    flat: dict[str, mx.array] = dict(tree_flatten(tree))
    wide = {n: a.astype(mx.float32) if a.dtype == mx.bfloat16 else a for n, a in flat.items()}
    return {n: (flat[n].dtype, a.shape, np.array(a).tobytes()) for n, a in wide.items()}


def step_of(optimizer: Any, compiled: bool) -> Callable[[Any, Any], Any]:
    """`apply_gradients`, compiled with the optimizer's state or as it is."""
    if not compiled:
        step: Callable[[Any, Any], Any] = optimizer.apply_gradients
        return step
    state = optimizer.state
    return partial(mx.compile, inputs=state, outputs=state)(optimizer.apply_gradients)


def counts(optimizer: Any) -> list[tuple[int, int]]:
    """Updates applied and skipped, a tier."""
    return [(tier.updates, tier.skipped) for tier in optimizer.get_tier_stats()]


def refused(message: str) -> Any:
    """Expect a ValueError with these words in it."""
    return pytest.raises(ValueError, match=re.escape(message))
