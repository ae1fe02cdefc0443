"""LoRA linear layers with a backward pass of their own, in place of mlx-lm's while a block runs.

The base's output and the low-rank product meet in one matmul, or on CUDA in a pass of our own, the
factor is put on the narrow activations, and layers that are given the same input share the products
with it. Modules keep their identity, their parameters' names and their place; only their class
changes, and is given back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from nested_core.kernels.cuda.concatenate import joined
from nested_core.kernels.cuda.lora_add import LowRankSum, expand, is_for_kernels, kernel_agrees
from nested_core.kernels.cuda.lora_matmuls import kernels_agree, narrow, outer
from nested_core.kernels.cuda.tiles import check_kernels

GROUP = "_shared_input"


class LowRankLinear(LoRALinear):
    """mlx_lm.tuner.lora.LoRALinear with the same parameters and, within rounding, the same output.

    A layer computes as mlx-lm does where its factors' dtype is not its input's.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Base output plus scale * dropout(x) @ lora_a @ lora_b."""
        if not x.dtype == self.lora_a.dtype == self.lora_b.dtype:
            output: mx.array = super().__call__(x)
            return output
        group: SharedInput | None = vars(self).get(GROUP)
        dropped = self.dropout(x)
        if dropped is not x:
            return _dropped_out(self, x, dropped)
        return SharedInput([self]).output(self, x) if group is None else group.output(self, x)


class SharedInput:
    """Layers that are given one input: x @ [A1 A2 ...] is one product, and so are its gradients.

    With z = scale (x @ A)^T, narrow and wide as A^T is, an output is x W + z^T B; with g its
    gradient, dz = scale (g B^T)^T, and the gradients are dz x, z g and g W^T + dz^T A^T. The base
    layers stay apart, so that no output keeps another's memory.
    """

    def __init__(self, layers: Sequence[LowRankLinear]) -> None:
        self._layers = layers
        ranks = [layer.lora_b.shape[0] for layer in layers]
        self._ranges = list(pairwise([0, *accumulate(ranks)]))
        self._input: mx.array | None = None
        self._outputs: dict[int, mx.array] = {}

    def output(self, layer: LowRankLinear, x: mx.array) -> mx.array:
        """The layer's output; the first layer asked computes those of all, the last lets go."""
        if self._input is not x or id(layer) not in self._outputs:
            self._input = x
            self._outputs = dict(zip(map(id, self._layers), self._compute(x), strict=True))
        found = self._outputs.pop(id(layer))
        if not self._outputs:
            self._input = None
        return found

    def _compute(self, x: mx.array) -> list[mx.array]:
        layers, ranges, count = self._layers, self._ranges, len(self._layers)
        scale = layers[0].scale

        @mx.custom_function
        def project(x: mx.array, *factors: mx.array) -> list[mx.array]:
            """Each layer's output, and what the backward pass needs: all lora_a^T, and z."""
            a = joined([each.T for each in factors[:count]]).reshape(-1, x.shape[-1])
            z = narrow([(a, x)], scale)
            parts = [z[start:end] for start, end in ranges]
            return [*with_low_rank(layers, x, parts, factors[count:]), a, z]

        @project.vjp
        def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
            x, b, g = primals[0], primals[1 + count :], cotangents[:count]
            a, z = outputs[count:]
            dz = narrow(list(zip(b, g, strict=True)), scale)
            dx = through(layers, x, g, dz, a)
            parts = [z[start:end] for start, end in ranges]
            da, *db = outer([(dz, x), *zip(parts, g, strict=True)])
            return dx, *(da[start:end].T for start, end in ranges), *db

        factors = [layer.lora_a for layer in layers] + [layer.lora_b for layer in layers]
        outputs: Any = project(x.reshape(-1, x.shape[-1]), *factors)
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs[:count]]


def with_low_rank(
    layers: Sequence[LoRALinear], x: mx.array, z: Sequence[mx.array], factors: Sequence[mx.array]
) -> Sequence[mx.array]:
    """Each base layer's output plus its z^T @ factor, of (rank, rows) and (rank, width)."""
    if is_for_kernels(x, factors):
        bases = [layer.linear(x) for layer in layers]
        return expand(list(map(LowRankSum, bases, z, factors)))
    products = [each.T @ b for each, b in zip(z, factors, strict=True)]
    return [_onto_base(layer, x, low) for layer, low in zip(layers, products, strict=True)]


def through(
    layers: Sequence[LoRALinear], x: mx.array, g: Sequence[mx.array], dz: mx.array, a: mx.array
) -> mx.array:
    """The gradient with respect to an input that layers share: through their bases, plus dz^T @ a.

    dz is (ranks, rows) and a (ranks, width). What is in x does not matter, for bases are linear.
    """
    if is_for_kernels(x, [a]):
        return expand([LowRankSum(through_bases(layers, x, g), dz, a)])[0]
    return through_bases(layers, x, g, dz.T @ a)


def through_bases(
    layers: Sequence[LoRALinear],
    x: mx.array,
    g: Sequence[mx.array],
    added: mx.array | None = None,
) -> mx.array:
    """The sum of the gradients through the base layers, and what is `added`."""
    total = _through_base(layers[0], x, g[0], added)
    for layer, each in zip(layers[1:], g[1:], strict=True):
        total = _through_base(layer, x, each, total)
    return total


def _onto_base(layer: LoRALinear, x: mx.array, added: mx.array) -> mx.array:
    """The base layer's output plus `added`, which MLX's matmul takes along."""
    base = layer.linear
    if type(base) is nn.Linear and "bias" not in base:
        return mx.addmm(added, x, base.weight.T)
    output: mx.array = base(x) + added
    return output


def _through_base(layer: LoRALinear, x: mx.array, g: mx.array, added: mx.array | None) -> mx.array:
    """The gradient through the frozen base layer, whatever it is made of, plus what is there."""
    if type(layer.linear) is nn.Linear:
        weight = layer.linear.weight
        return g @ weight if added is None else mx.addmm(added, g, weight)
    gradient: mx.array
    (gradient,) = mx.vjp(layer.linear, [x], [g])[1]
    return gradient if added is None else added + gradient


def _dropped_out(layer: LowRankLinear, x: mx.array, dropped: mx.array) -> mx.array:
    """The output where the low-rank path alone sees dropout, as in mlx-lm."""
    z = (dropped @ layer.lora_a) * layer.scale
    output: mx.array = mx.addmm(layer.linear(x), z, layer.lora_b)
    return output


def check_low_rank(ranks: Collection[int]) -> None:
    """Compile and check all kernels for layers of these ranks, and for what they share."""
    check_kernels(ranks, kernels_agree)
    check_kernels(ranks, kernel_agrees)


@contextmanager
def low_rank(model: nn.Module, groups: Sequence[Sequence[nn.Module]] = ()) -> Iterator[None]:
    """Have every LoRALinear of a model computed here; `groups` are given one input each."""
    layers: list[Any] = [m for _, m in model.named_modules() if type(m) is LoRALinear]
    ranks = {id(layer): layer.lora_b.shape[0] for layer in layers}
    together = (sum(ranks.get(id(layer), 0) for layer in group) for group in groups)
    check_low_rank([*ranks.values(), *together])
    try:
        for layer in layers:
            layer.__class__ = LowRankLinear
        for group in groups:
            shared = SharedInput([layer for layer in group if isinstance(layer, LowRankLinear)])
            for layer in group:
                object.__setattr__(layer, GROUP, shared)
        yield
    finally:
        for layer in layers:
            vars(layer).pop(GROUP, None)
            layer.__class__ = LoRALinear
