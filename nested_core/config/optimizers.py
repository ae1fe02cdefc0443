"""The optimizers that a configuration can name: those of mlx.optimizers, in small letters.

What each takes is read from its signature, so that a new one of mlx needs no change here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from nested_core.config.nested import NestedSection

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


def parse_optimizer_name(name: str) -> str:
    """The name in small letters, as mlx_lm.lora reads it; ValueError for one that mlx has not."""
    name = name.lower()
    if name not in MLX_LM_OPTIMIZERS and name not in optimizer_classes():
        raise ValueError(f"{name!r} is no optimizer; there are {sorted(optimizer_classes())}")
    return name


def optimizer_problems(
    optimizer: str, optimizer_config: Mapping[str, Mapping[str, Any]], nested: NestedSection
) -> Iterator[str]:
    """What `optimizer_config` and `nested` ask of the optimizer that it does not take."""
    others = optimizer_config.keys() - set(MLX_LM_OPTIMIZERS)
    strange = sorted(name for name in others if name not in optimizer_classes())
    if strange:
        known = sorted(optimizer_classes())
        yield f"optimizer_config: {strange} are no optimizers; there are {known}"
    arguments = optimizer_config.get(optimizer, {})
    if not arguments and nested.weight_decay is None and nested.learning_rate_scale is None:
        return  # nothing to ask mlx for
    defaults = default_arguments(optimizer)
    unknown = arguments.keys() - defaults
    if unknown:
        yield (
            f"optimizer_config.{optimizer} does not take {sorted(unknown)}; "
            f"it takes {sorted(defaults)}"
        )
    if nested.weight_decay is not None and "weight_decay" not in defaults:
        yield f"nested.weight_decay needs optimizer: adamw or another with one, not {optimizer}"
    computes_rate = (defaults | dict(arguments)).get("relative_step", False)
    if nested.learning_rate_scale is not None and computes_rate:
        yield (
            f"nested.learning_rate_scale: {optimizer} computes its own step size; give "
            f"optimizer_config.{optimizer}.relative_step: false"
        )


def default_arguments(optimizer: str) -> dict[str, Any]:
    """What an optimizer takes beside its learning rate, each with mlx's default."""
    parameters = inspect.signature(optimizer_classes()[optimizer]).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "learning_rate"}
