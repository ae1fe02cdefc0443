"""Find LoRA layers that share an input, or form a gated MLP, by tracing one call of the model.

Arrays are identified by object identity, not by names, so the result reflects what the code does
with them, and operations in between are noticed. Nothing is computed: MLX's arrays are lazy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from nested_core.kernels.patching import replacing_calls, replacing_function
from nested_core.models.parameters import in_evaluation_mode

plain_swiglu: Any = activations.swiglu


class ModuleCall(NamedTuple):
    """A call of a module with one array: the module, its input and its output."""

    module: Any
    x: Any
    output: Any


class SwigluCall(NamedTuple):
    """A call of mlx-lm's swiglu: its inputs and output."""

    gate: Any
    up: Any
    output: Any


class GatedMLP(NamedTuple):
    """A module that computes down(swiglu(gate(x), up(x))) with three LoRA layers, and nothing else.

    Traced in evaluation mode; none of mlx-lm's such modules computes otherwise in training.
    """

    module: nn.Module
    layers: tuple[LoRALinear, LoRALinear, LoRALinear]  # gate, up, down

    def gate_proj_matches_up_proj(self) -> bool:
        """Return whether gate and up have equal rank and dtype, so that they can share products."""
        gate, up, _ = (layer.lora_b for layer in self.layers)
        return bool(gate.shape[0] == up.shape[0] and gate.dtype == up.dtype)


@dataclass
class CallTrace:
    """The calls of a model's LoRA layers, of modules that contain some, and of swiglu, in order.

    It keeps their arrays alive, so that ids of arrays stay unique.
    """

    layers: list[ModuleCall] = field(default_factory=list)
    owners: list[ModuleCall] = field(default_factory=list)
    swiglus: list[SwigluCall] = field(default_factory=list)

    def calls_of_layers_called_once(self) -> list[ModuleCall]:
        """Return the calls of those layers that are called exactly once."""
        called = [id(call.module) for call in self.layers]
        return [call for call in self.layers if called.count(id(call.module)) == 1]


def group_layers_by_input(
    trace: CallTrace, exclude: Iterable[LoRALinear] = ()
) -> list[list[LoRALinear]]:
    """Group LoRALinear layers that have the same input, rank, scale and dtype.

    A layer that is called more than once, that is the only one with its input, or that is in
    `exclude` is in no group.
    """
    groups: dict[tuple[Any, ...], list[LoRALinear]] = {}
    excluded = set(map(id, exclude))
    for layer, x, _ in trace.calls_of_layers_called_once():
        if id(layer) in excluded:
            continue
        rank = layer.lora_b.shape[0]
        key = type(layer), id(x), rank, layer.scale, layer.lora_a.dtype, layer.lora_b.dtype
        groups.setdefault(key, []).append(layer)
    return [group for group in groups.values() if len(group) > 1]


def find_gated_mlps(trace: CallTrace) -> list[GatedMLP]:
    """Find the modules that are gated MLPs of LoRA layers, each called exactly once.

    Such a module computes down(swiglu(gate(x), up(x))) and nothing else. It is found by the arrays
    that its layers passed on in a traced call, whatever the names of its parts.
    """
    layers = trace.calls_of_layers_called_once()
    by_output = {id(call.output): call for call in layers}
    by_input = {id(call.x): call for call in layers}
    owners = {(id(call.x), id(call.output)): call.module for call in trace.owners}
    mlps = []
    for swiglu in trace.swiglus:
        # The layers that made swiglu's inputs, and the one that takes its output
        gate, up = by_output.get(id(swiglu.gate)), by_output.get(id(swiglu.up))
        down = by_input.get(id(swiglu.output))
        if gate is None or up is None or gate is up or down is None or gate.x is not up.x:
            continue
        # The module whose input and output they share
        owner = owners.get((id(gate.x), id(down.output)))
        if owner is None or gate.module.scale != up.module.scale:
            continue
        mlp_layers = gate.module, up.module, down.module
        parts = owner.children().values()  # another part may be a dropout, which leaves no trace
        is_lora = all(type(layer) is LoRALinear for layer in mlp_layers)
        if is_lora and set(map(id, parts)) == set(map(id, mlp_layers)):
            mlps.append(GatedMLP(owner, mlp_layers))
    return mlps


def trace_calls(model: nn.Module) -> CallTrace:
    """Call a model with two tokens, in evaluation mode, and record the calls of its layers."""
    trace = CallTrace()
    with in_evaluation_mode(model), _recording_calls(model, trace):
        model(mx.zeros((1, 2), mx.int32))
    return trace


@contextmanager
def _recording_calls(model: nn.Module, trace: CallTrace) -> Iterator[None]:
    """Record the calls of the model's LoRA layers, their owners and swiglu during the block.

    An owner is a module that has a LoRA layer as a direct part. The calls go to `trace`.
    """

    def recorded(module: nn.Module, calls: list[ModuleCall]) -> Callable[..., Any]:
        """Wrap the module's call; a call with one positional argument is appended to `calls`."""
        original = type(module).__call__

        def call(*args: Any, **kwargs: Any) -> Any:
            """Call the module; record a call with exactly one argument."""
            output = original(module, *args, **kwargs)
            if len(args) == 1 and not kwargs:
                calls.append(ModuleCall(module, args[0], output))
            return output

        return call

    def recorded_swiglu(gate: mx.array, up: mx.array) -> mx.array:
        """Compute swiglu and record the call."""
        output: mx.array = plain_swiglu(gate, up)
        trace.swiglus.append(SwigluCall(gate, up, output))
        return output

    modules = [module for _, module in model.named_modules()]
    layers = [module for module in modules if _is_lora_layer(module)]
    owners = [module for module in modules if any(map(_is_lora_layer, module.children().values()))]
    with (
        replacing_calls((module, recorded(module, trace.layers)) for module in layers),
        replacing_calls((module, recorded(module, trace.owners)) for module in owners),
        replacing_function(model, "swiglu", plain_swiglu, recorded_swiglu),
    ):
        yield


def _is_lora_layer(module: Any) -> bool:
    """Return whether a module is one of mlx-lm's LoRA or DoRA linear layers."""
    return type(module) in (LoRALinear, DoRALinear)
