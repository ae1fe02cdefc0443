"""Which modules of LoRA layers are gated MLPs: those that compute one, and do nothing besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.activations import swiglu
from mlx_lm.tuner.lora import LoRALinear

from nested_core.rooms.cuda.call_tracing import find_gated_mlps, trace_calls


class Gated(nn.Module):
    """A gated MLP of LoRA layers, and a part that some ways of computing it use."""

    def __init__(self, way: Callable[[Any, mx.array], mx.array], **scales: float) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            LoRALinear(8, 8, r=2, scale=scales.get(name, 2.0)) for name in ("gate", "up", "down")
        )
        self.other = LoRALinear(8, 8, r=2)
        self._way = way

    def __call__(self, x: mx.array) -> mx.array:
        return self._way(self, x)


class Holding(nn.Module):
    """A model of one such module, which is given an array of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, tokens: mx.array) -> mx.array:
        output: mx.array = self.inner(mx.ones((*tokens.shape, 8)))
        return output


def inner(m: Any, x: mx.array) -> Any:
    return swiglu(m.gate(x), m.up(x))


WAYS: dict[str, Callable[[Any, mx.array], Any]] = {
    "product changed": lambda m, x: m.down(2 * inner(m, x)),
    "something added": lambda m, x: m.down(inner(m, x)) + x,
    "output scaled": lambda m, x: 0.5 * m.down(inner(m, x)),
    "gate clamped": lambda m, x: m.down(swiglu(mx.clip(m.gate(x), -1, 1), m.up(x))),
    "up changed": lambda m, x: m.down(swiglu(m.gate(x), m.up(x) + 1)),
    "two inputs": lambda m, x: m.down(swiglu(m.gate(x), m.up(2 * x))),
    "an input of its own": lambda m, x: m.down(inner(m, 2 * x)),
    "its own activation": lambda m, x: m.down(nn.silu(m.gate(x)) * m.up(x)),
    "gate twice": lambda m, x: m.down(swiglu(m.gate(x), m.up(x) + 0 * m.gate(2 * x))),
    "down twice": lambda m, x: m.down(inner(m, x) + 0 * m.down(x)),
    "called twice": lambda m, x: m.down(inner(m, m.down(inner(m, x)))),
    "another down": lambda m, x: m.other(m.down(inner(m, x))),
    "no down": inner,
    "gate's keyword": lambda m, x: m.down(swiglu(m.gate(x=x), m.up(x))),
}


def plain(m: Any, x: mx.array) -> mx.array:
    output: mx.array = m.down(inner(m, x))
    return output


def turned(m: Any, x: mx.array) -> mx.array:
    output: mx.array = m.down(swiglu(m.up(x), m.gate(x)))
    return output


def without_other(module: Gated) -> Gated:
    del module["other"]
    return module


def test_gate_and_up_are_told_apart_by_what_is_done_with_them() -> None:
    for way in (plain, turned):
        module: Any = without_other(Gated(way))
        (found,) = find_gated_mlps(trace_calls(Holding(module)))
        first = [module.gate, module.up] if way is plain else [module.up, module.gate]
        assert list(map(id, found.layers)) == list(map(id, [*first, module.down]))
        assert found.module is module


@pytest.mark.parametrize("way", WAYS)
def test_a_module_that_does_anything_else_is_no_gated_mlp(way: str) -> None:
    module = Gated(WAYS[way])
    assert (
        find_gated_mlps(trace_calls(Holding(module if "another" in way else without_other(module))))
        == []
    )


def test_gate_and_up_of_two_scales_are_no_gated_mlp_and_down_has_its_own() -> None:
    assert find_gated_mlps(trace_calls(Holding(without_other(Gated(plain, gate=3.0))))) == []
    assert find_gated_mlps(trace_calls(Holding(without_other(Gated(plain, up=3.0))))) == []
    assert len(find_gated_mlps(trace_calls(Holding(without_other(Gated(plain, down=3.0)))))) == 1


def test_one_layer_for_gate_and_up_is_no_gated_mlp() -> None:
    def square(m: Any, x: mx.array) -> mx.array:
        gate = m.gate(x)
        output: mx.array = m.down(swiglu(gate, gate))
        return output

    module = without_other(Gated(square))
    del module["up"]
    assert find_gated_mlps(trace_calls(Holding(module))) == []


@pytest.mark.parametrize("place", ["gate", "up", "down"])
def test_a_layer_that_has_no_adapter_or_another_kind_makes_it_none(place: str) -> None:
    class Other(LoRALinear):
        """Adapted otherwise."""

    for layer in (nn.Linear(8, 8), Other(8, 8)):
        module = without_other(Gated(plain))
        setattr(module, place, layer)
        assert find_gated_mlps(trace_calls(Holding(module))) == []


def test_a_module_called_twice_is_no_gated_mlp() -> None:
    module = without_other(Gated(plain))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def __call__(self, x: mx.array) -> mx.array:
            output: mx.array = self.inner(x) + self.inner(2 * x)
            return output

    assert find_gated_mlps(trace_calls(Holding(Twice()))) == []


def test_a_dropout_that_does_nothing_while_it_is_traced_makes_it_none() -> None:
    def dropping(m: Any, x: mx.array) -> mx.array:
        output: mx.array = m.down(m.drop(inner(m, x)))
        return output

    module: Any = without_other(Gated(dropping))
    module.drop = nn.Dropout(0.5)
    assert find_gated_mlps(trace_calls(Holding(module))) == []


def test_a_model_whose_code_has_no_other_module_is_traced_too() -> None:
    """All of this file's modules in it hold LoRA layers, and are trace_calls themselves."""

    class Model(Gated):
        def __call__(self, tokens: mx.array) -> mx.array:
            output: mx.array = self.inner(self.other(mx.ones((*tokens.shape, 8))))
            return output

    model: Any = Model(plain)
    model.inner = without_other(Gated(plain))
    (found,) = find_gated_mlps(trace_calls(model))
    assert found.module is model.inner
