"""LoRA linear layers with a backward pass of their own, in place of mlx-lm's while a block runs.

The base's output and the low-rank product meet in one matmul, the factor is put on the narrow
activations, and layers that are given the same input share the products with it. Modules keep their
identity, their parameters' names and their place; only their class changes, and is given back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from nested_core.kernels.joining import joined
from nested_core.kernels.low_rank import check_kernels, narrow, outer

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
            parts = zip(layers, ranges, factors[count:], strict=True)
            added = ((layer, z[start:end].T @ b) for layer, (start, end), b in parts)
            return [*(_onto_base(layer, x, low) for layer, low in added), a, z]

        @project.vjp
        def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
            x, b, g = primals[0], primals[1 + count :], cotangents[:count]
            a, z = outputs[count:]
            dz = narrow(list(zip(b, g, strict=True)), scale)
            dx = dz.T @ a
            for layer, each in zip(layers, g, strict=True):
                dx = _through_base(layer, x, each, dx)
            parts = [z[start:end] for start, end in ranges]
            da, *db = outer([(dz, x), *zip(parts, g, strict=True)])
            return dx, *(da[start:end].T for start, end in ranges), *db

        factors = [layer.lora_a for layer in layers] + [layer.lora_b for layer in layers]
        outputs: Any = project(x.reshape(-1, x.shape[-1]), *factors)
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs[:count]]


def _onto_base(layer: LowRankLinear, x: mx.array, added: mx.array) -> mx.array:
    """The base layer's output plus `added`: MLX's matmul takes it along at no cost."""
    base = layer.linear
    if type(base) is nn.Linear and "bias" not in base:
        return mx.addmm(added, x, base.weight.T)
    output: mx.array = base(x) + added
    return output


def _through_base(layer: LowRankLinear, x: mx.array, g: mx.array, added: mx.array) -> mx.array:
    """The gradient through the frozen base layer, whatever it is made of, plus `added`."""
    if type(layer.linear) is nn.Linear:
        return mx.addmm(added, g, layer.linear.weight)
    (gradient,) = mx.vjp(layer.linear, [x], [g])[1]
    return added + gradient


def _dropped_out(layer: LowRankLinear, x: mx.array, dropped: mx.array) -> mx.array:
    """The output where the low-rank path alone sees dropout, as in mlx-lm."""
    z = (dropped @ layer.lora_a) * layer.scale
    output: mx.array = mx.addmm(layer.linear(x), z, layer.lora_b)
    return output


@contextmanager
def low_rank(model: nn.Module, groups: Sequence[Sequence[nn.Module]] = ()) -> Iterator[None]:
    """Have every LoRALinear of a model computed here; `groups` are given one input each."""
    layers: list[Any] = [m for _, m in model.named_modules() if type(m) is LoRALinear]
    ranks = {id(layer): layer.lora_b.shape[0] for layer in layers}
    together = (sum(ranks.get(id(layer), 0) for layer in group) for group in groups)
    check_kernels([*ranks.values(), *together])
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


def shared_inputs(model: nn.Module) -> list[list[nn.Module]]:
    """LoRALinear layers that are given one array, by watching a call; alike in all but their width.

    They are of one rank, scale and dtype. Layers that are called more than once, or alone, are in
    no group.
    """
    calls: list[tuple[nn.Module, Any]] = []
    layers: list[Any] = [m for _, m in model.named_modules() if type(m) is LoRALinear]

    class Watched(LoRALinear):
        def __call__(self, x: mx.array) -> mx.array:
            calls.append((self, x))
            output: mx.array = super().__call__(x)
            return output

    was_training = model.training
    model.eval()  # no dropout: nothing is drawn
    try:
        for layer in layers:
            layer.__class__ = Watched
        model(mx.zeros((1, 2), mx.int32))
    finally:
        model.train(was_training)
        for layer in layers:
            layer.__class__ = LoRALinear
    return _grouped(calls)


def _grouped(calls: Sequence[tuple[nn.Module, Any]]) -> list[list[nn.Module]]:
    times = [id(layer) for layer, _ in calls]
    groups: dict[tuple[Any, ...], list[nn.Module]] = {}
    for layer, x in calls:  # the inputs are alive here, so that their ids are their own
        if times.count(id(layer)) == 1:
            kind = layer.lora_b.shape[0], layer.scale, layer.lora_a.dtype, layer.lora_b.dtype
            groups.setdefault((id(x), *kind), []).append(layer)
    return [group for group in groups.values() if len(group) > 1]
