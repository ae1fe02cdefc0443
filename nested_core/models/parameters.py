"""References to a model's trainable parameters: read, assign, or temporarily replace them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class ParameterRef(NamedTuple):
    """One trainable array: the module that has it, its key there, and the dtype it computes in."""

    module: nn.Module
    key: str
    dtype: mx.Dtype


ParameterRefs = dict[str, ParameterRef]
"""By dotted parameter name, in the model's order."""


def trainable_parameters(model: nn.Module) -> dict[str, mx.array]:
    """The trainable parameters of a model, as they are now, by dotted name."""
    return dict(tree_flatten(model.trainable_parameters()))


def reference_trainable_parameters(
    model: nn.Module, *, masters: bool = False, dtype: mx.Dtype | None = None
) -> ParameterRefs:
    """References to every trainable parameter of a model.

    Args:
        model: the model with its adapter attached and everything else frozen.
        masters: convert the parameters to float32 in the model; they compute in the dtype they had.
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
    """The arrays that the model has now, by dotted name."""
    return {name: ref.module[ref.key] for name, ref in refs.items()}


def assign_parameters(refs: ParameterRefs, values: Mapping[str, mx.array]) -> None:
    """Put arrays, which may be tracers, into the model, cast to the dtype they compute in."""
    for name, value in values.items():
        module, key, dtype = refs[name]
        module[key] = value.astype(dtype)


@contextmanager
def restoring_parameters(refs: ParameterRefs) -> Iterator[None]:
    """When the block ends, give the model back the arrays that it had before."""
    originals = read_parameters(refs)
    try:
        yield
    finally:
        for name, value in originals.items():
            module, key, _ = refs[name]
            module[key] = value


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout off in the block; afterwards every module is in the mode it was in before."""
    modes = [(module, module.training) for _, module in model.named_modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module._set_training_mode(was_training)


def float32_weight(module: Any) -> mx.array:
    """The weight that a module computes with, dequantized if need be, in float32."""
    weight: mx.array = module.weight
    if "scales" in module:
        format_ = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        weight = mx.dequantize(weight, module.scales, module.get("biases"), **format_)
    return weight.astype(mx.float32)
