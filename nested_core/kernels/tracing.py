"""What a model does with its LoRA layers, by watching a call of it: not by their names.

Arrays are told apart by identity, so what is found is what the code does with them, and nothing
that lies between is missed. Nothing is computed: MLX's arrays are lazy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from nested_core.kernels.patching import in_code_of, standing_in
from nested_core.kernels.swiglu import plain_swiglu
from nested_core.models.parameters import evaluation_mode


class Call(NamedTuple):
    """A layer or module, the one array it was given, and what it gave."""

    module: Any
    x: Any
    output: Any


class Product(NamedTuple):
    """A call of mlx-lm's swiglu."""

    gate: Any
    up: Any
    output: Any


class GatedMLP(NamedTuple):
    """A module that computes down(swiglu(gate(x), up(x))) of three LoRA layers, and nothing else.

    It is seen in evaluation mode; none of mlx-lm's such modules computes otherwise in training.
    """

    module: nn.Module
    layers: tuple[LoRALinear, LoRALinear, LoRALinear]  # gate, up, down

    def is_even(self) -> bool:
        """Whether gate and up are of one rank and dtype, as layers that share products are."""
        kinds = {(each.lora_b.shape[0], each.lora_b.dtype) for each in self.layers[:2]}
        return len(kinds) == 1


@dataclass
class Calls:
    """What was called, in order; it keeps the arrays, so that their ids are their own."""

    layers: list[Call] = field(default_factory=list)
    owners: list[Call] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)

    def layers_once(self) -> list[Call]:
        """The calls of layers that were called once."""
        times = [id(call.module) for call in self.layers]
        return [call for call in self.layers if times.count(id(call.module)) == 1]


def shared_inputs(calls: Calls, apart: Iterable[LoRALinear] = ()) -> list[list[LoRALinear]]:
    """LoRALinear layers that are given one array, alike in all but their width.

    They are of one rank, scale and dtype. Layers that are called more than once, or alone, or are
    to stay `apart`, are in no group.
    """
    groups: dict[tuple[Any, ...], list[LoRALinear]] = {}
    others = set(map(id, apart))
    for layer, x, _ in calls.layers_once():
        if id(layer) in others:
            continue
        kind = layer.lora_b.shape[0], layer.scale, layer.lora_a.dtype, layer.lora_b.dtype
        groups.setdefault((id(x), *kind), []).append(layer)
    return [group for group in groups.values() if len(group) > 1]


def gated_mlps(calls: Calls) -> list[GatedMLP]:
    """The modules that are gated MLPs of LoRA layers, each of which is called once."""
    layers = calls.layers_once()
    by_output = {id(call.output): call for call in layers}
    by_input = {id(call.x): call for call in layers}
    owners = {(id(call.x), id(call.output)): call.module for call in calls.owners}
    found = []
    for product in calls.products:
        gate, up = by_output.get(id(product.gate)), by_output.get(id(product.up))
        down = by_input.get(id(product.output))
        if gate is None or up is None or gate is up or down is None or gate.x is not up.x:
            continue
        owner = owners.get((id(gate.x), id(down.output)))
        three = gate.module, up.module, down.module
        if owner is not None and gate.module.scale == up.module.scale and _is_all(owner, three):
            found.append(GatedMLP(owner, three))
    return found


def _is_all(owner: nn.Module, layers: Iterable[LoRALinear]) -> bool:
    """Whether a module has no other parts: a dropout, say, is not seen while it is watched."""
    return set(map(id, owner.children().values())) == set(map(id, layers))


def watched(model: nn.Module) -> Calls:
    """What a call of a model calls; no dropout is drawn."""
    calls = Calls()
    with evaluation_mode(model), _noting(model, calls):
        model(mx.zeros((1, 2), mx.int32))
    return calls


@contextmanager
def _noting(model: nn.Module, calls: Calls) -> Iterator[None]:
    def noting(module: nn.Module, into: list[Call]) -> Callable[..., Any]:
        """The module's own call, which is noted where it has one argument."""
        own = type(module).__call__

        def call(*args: Any, **kwargs: Any) -> Any:
            output = own(module, *args, **kwargs)
            if len(args) == 1 and not kwargs:
                into.append(Call(module, args[0], output))
            return output

        return call

    def swiglu(gate: mx.array, up: mx.array) -> mx.array:
        output: mx.array = plain_swiglu(gate, up)
        calls.products.append(Product(gate, up, output))
        return output

    modules = [module for _, module in model.named_modules()]
    layers = [module for module in modules if type(module) is LoRALinear]
    owners = [module for module in modules if any(map(_is_lora, module.children().values()))]
    with ExitStack() as stack:
        for module in layers:
            stack.enter_context(standing_in(module, noting(module, calls.layers)))
        for module in owners:
            stack.enter_context(standing_in(module, noting(module, calls.owners)))
        stack.enter_context(in_code_of(model, "swiglu", plain_swiglu, swiglu))
        yield


def _is_lora(child: Any) -> bool:
    return type(child) is LoRALinear
