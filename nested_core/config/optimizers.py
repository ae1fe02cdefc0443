"""The optimizers that a configuration can name: those of mlx.optimizers, in small letters.

What each takes is read from its signature, so that a new one of mlx needs no change here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

MLX_LM_OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")


@cache
def optimizer_classes() -> Mapping[str, type]:
    """mlx's optimizers by name; the first call imports mlx, which takes some 0.2 s."""
    from mlx import optimizers

    classes = [value for value in vars(optimizers).values() if isinstance(value, type)]
    return {
        cls.__name__.lower(): cls
        for cls in classes
        if "learning_rate" in inspect.signature(cls).parameters
    }


def known_optimizer(name: str) -> str:
    """The name itself; ValueError where mlx has no such optimizer."""
    if name not in MLX_LM_OPTIMIZERS and name not in optimizer_classes():
        raise ValueError(f"{name!r} is no optimizer; there are {sorted(optimizer_classes())}")
    return name


def default_arguments(name: str) -> dict[str, Any]:
    """What an optimizer takes beside its learning rate, each with mlx's default."""
    parameters = inspect.signature(optimizer_classes()[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "learning_rate"}
