"""References to a model's trainable parameters: read, assign, or temporarily replace them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class ParameterRef(NamedTuple):
    """A reference to a trainable array: its module, its key there, and the dtype it computes in."""

    module: nn.Module
    key: str
    dtype: mx.Dtype


ParameterRefs = dict[str, ParameterRef]
"""References by dotted parameter name, in the model's order."""


def trainable_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return the current trainable parameters of a model, by dotted name."""
    return dict(tree_flatten(model.trainable_parameters()))


def reference_trainable_parameters(
    model: nn.Module, *, masters: bool = False, dtype: mx.Dtype | None = None
) -> ParameterRefs:
    """Return references to all trainable parameters of a model.

    Args:
        model: the model with its adapter attached and everything else frozen.
        masters: convert the parameters in the model to float32; they still compute in their old
            dtype.
        dtype: the dtype that the parameters compute in; None is each one's own.
    """
    modules = dict(model.named_modules())
    refs = {}
    for name, value in trainable_parameters(model).items():
        parent, _, key = name.rpartition(".")
        refs[name] = ParameterRef(modules[parent], key, dtype or value.dtype)
        if masters:
            modules[parent][key] = value.astype(mx.float32)
    return refs


def read_parameters(refs: ParameterRefs) -> dict[str, mx.array]:
    """Return the current arrays of the referenced parameters, by dotted name."""
    return {name: ref.module[ref.key] for name, ref in refs.items()}


def assign_parameters(refs: ParameterRefs, values: Mapping[str, mx.array]) -> None:
    """Put arrays, which may be tracers, into the model, cast to the dtype they compute in."""
    for name, value in values.items():
        module, key, dtype = refs[name]
        module[key] = value if value.dtype == dtype else value.astype(dtype)  # itself, if it fits


@contextmanager
def restoring_parameters(refs: ParameterRefs) -> Iterator[None]:
    """Restore the referenced arrays in the model when the block ends."""
    originals = read_parameters(refs)
    try:
        yield
    finally:
        for name, value in originals.items():
            module, key, _ = refs[name]
            module[key] = value


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout off within the block; afterwards restore each module's mode."""
    in_training = [module for _, module in model.named_modules() if module.training]
    for module in in_training:
        module._set_training_mode(False)
    try:
        yield
    finally:
        for module in in_training:
            module._set_training_mode(True)


def float32_weight(module: nn.Module) -> mx.array:
    """Return the weight that a module computes with in float32, dequantized if necessary."""
    weight: mx.array = module.weight
    if "scales" in module:
        options = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        weight = mx.dequantize(weight, module.scales, module.get("biases"), **options)
    return weight.astype(mx.float32)
