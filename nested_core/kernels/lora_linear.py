"""LoRA and DoRA layers with a backward pass of their own, in place of mlx-lm's while a block runs.

The base's output and the low-rank product meet in one matmul, or on CUDA in a pass of our own. The
scale is applied to the narrow activations, and layers with the same input share its products.
Modules keep their identity, their parameters' names and their place; only their class changes, and
changes back when the block ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from nested_core.kernels.device_operations import device_operations

GROUP_ATTRIBUTE = "_shared_input"
WEIGHT_NORM_ATTRIBUTE = "_squared_weight_norm"

AdapterLinear = LoRALinear | DoRALinear


class OptimizedLoRALinear(LoRALinear):
    """mlx_lm.tuner.lora.LoRALinear with the same parameters and, within rounding, the same output.

    A layer computes as mlx-lm does where its factors' dtype is not its input's.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Base output plus scale * dropout(x) @ lora_a @ lora_b."""
        if not x.dtype == self.lora_a.dtype == self.lora_b.dtype:
            return cast(mx.array, super().__call__(x))
        return compute_lora_output(self, x)


class OptimizedDoRALinear(DoRALinear):
    """mlx_lm.tuner.dora.DoRALinear with the same parameters and, within rounding, the same output.

    It is a LoRA layer whose outputs are multiplied by m / |W + scale B^T A^T|, the norm of each row
    (Liu et al. 2024, DoRA, arXiv 2402.09353, section 4.3: no gradient goes through the norm). The
    adapted weight is never made: its squared norm is |W|^2 + 2 scale (W A) B + scale^2 (A B)^T A B.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """m / norm times the LoRA layer's output without its bias, plus that bias."""
        if not x.dtype == self.lora_a.dtype == self.lora_b.dtype:
            return cast(mx.array, super().__call__(x))
        magnitude = (self.m / mx.stop_gradient(self._adapted_norm())).astype(x.dtype)
        output = magnitude * compute_lora_output(self, x)
        return output + (1 - magnitude) * self.linear.bias if "bias" in self.linear else output

    def _adapted_norm(self) -> mx.array:
        """The norm of each row of the adapted weight, float32 (outputs,)."""
        products = self.linear(self.lora_a.T).astype(mx.float32)  # (rank, outputs)
        if "bias" in self.linear:
            products = products - self.linear.bias
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        added = 2 * products + self.scale * ((a.T @ a) @ b)
        return mx.sqrt(vars(self)[WEIGHT_NORM_ATTRIBUTE] + self.scale * (added * b).sum(axis=0))


OPTIMIZED_CLASSES: dict[type, type] = {
    LoRALinear: OptimizedLoRALinear,
    DoRALinear: OptimizedDoRALinear,
}


def compute_lora_output(layer: AdapterLinear, x: mx.array) -> mx.array:
    """A layer's base output plus scale * dropout(x) @ lora_a @ lora_b."""
    dropped = layer.dropout(x)
    if dropped is not x:
        return compute_dropout_output(layer, x, dropped)
    group: LayersSharingInput = vars(layer).get(GROUP_ATTRIBUTE) or LayersSharingInput([layer])
    return group.layer_output(layer, x)


def compute_dropout_output(layer: AdapterLinear, x: mx.array, dropped: mx.array) -> mx.array:
    """The output of a layer whose low-rank path alone sees dropout, as in mlx-lm."""
    scale, operations = layer.scale, device_operations()

    @mx.custom_function
    def project(x: mx.array, dropped: mx.array, a: mx.array, b: mx.array) -> list[mx.array]:
        """The output, and z, which the backward pass needs."""
        z = operations.project_to_rank([(a.T, dropped)], scale)
        return [*add_low_rank_products([layer], x, [z], [b]), z]

    @project.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        x, dropped, a, b = primals
        g, z = cotangents[0], outputs[1]
        dz = operations.project_to_rank([(b, g)], scale)
        dx = base_input_gradient([layer], x, [g]).astype(x.dtype)
        da, db = operations.factor_gradients([(dz, dropped), (z, g)])
        return dx, dz.T @ a.T, da.T, db

    rows = [each.reshape(-1, each.shape[-1]) for each in (x, dropped)]
    outputs: Any = project(*rows, layer.lora_a, layer.lora_b)
    output: mx.array = outputs[0].reshape(*x.shape[:-1], -1)
    return output


class LayersSharingInput:
    """Layers with one input: x @ [A1 A2 ...] is one product, and so are its gradients.

    With z = scale (x @ A)^T, narrow and wide as A^T is, an output is x W + z^T B; with g its
    gradient, dz = scale (g B^T)^T, and the gradients are dz x, z g and g W^T + dz^T A^T. The base
    layers stay apart, so that no output keeps another's memory.
    """

    def __init__(self, layers: Sequence[AdapterLinear]) -> None:
        self._layers = layers
        ranks = [layer.lora_b.shape[0] for layer in layers]
        self._rank_ranges = list(pairwise([0, *accumulate(ranks)]))
        self._input: mx.array | None = None
        self._outputs: dict[int, mx.array] = {}

    def layer_output(self, layer: AdapterLinear, x: mx.array) -> mx.array:
        """The output of one layer.

        The first call with an input computes all layers' outputs, and the last drops the input.
        """
        if self._input is not x or id(layer) not in self._outputs:
            self._input = x
            self._outputs = dict(zip(map(id, self._layers), self._compute_outputs(x), strict=True))
        output = self._outputs.pop(id(layer))
        if not self._outputs:
            self._input = None
        return output

    def _compute_outputs(self, x: mx.array) -> list[mx.array]:
        layers, rank_ranges = self._layers, self._rank_ranges
        count, scale, operations = len(layers), layers[0].scale, device_operations()

        @mx.custom_function
        def project(x: mx.array, *factors: mx.array) -> list[mx.array]:
            """Each layer's output, and what the backward pass needs: all lora_a^T, and z."""
            transposed = [factor.T for factor in factors[:count]]
            a = operations.concatenate_flattened(transposed).reshape(-1, x.shape[-1])
            z = operations.project_to_rank([(a, x)], scale)
            parts = [z[start:end] for start, end in rank_ranges]
            return [*add_low_rank_products(layers, x, parts, factors[count:]), a, z]

        @project.vjp
        def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
            x, b = primals[0], primals[1 + count :]
            g = cotangents[:count]
            a, z = outputs[count:]
            dz = operations.project_to_rank(list(zip(b, g, strict=True)), scale)
            dx = input_gradient(layers, x, g, dz, a)
            parts = [z[start:end] for start, end in rank_ranges]
            da, *db = operations.factor_gradients([(dz, x), *zip(parts, g, strict=True)])
            return dx, *(da[start:end].T for start, end in rank_ranges), *db

        factors = [layer.lora_a for layer in layers] + [layer.lora_b for layer in layers]
        outputs: Any = project(x.reshape(-1, x.shape[-1]), *factors)
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs[:count]]


def add_low_rank_products(
    layers: Sequence[AdapterLinear], x: mx.array, z: Sequence[mx.array], factors: Sequence[mx.array]
) -> Sequence[mx.array]:
    """Each base layer's output plus its z^T @ factor, of (rank, rows) and (rank, width)."""
    operations = device_operations()
    if operations.can_add_low_rank_products(x, factors):
        return operations.add_low_rank_products([layer.linear(x) for layer in layers], z, factors)
    products = [each.T @ b for each, b in zip(z, factors, strict=True)]
    return [add_to_base_output(layer, x, low) for layer, low in zip(layers, products, strict=True)]


def input_gradient(
    layers: Sequence[AdapterLinear], x: mx.array, g: Sequence[mx.array], dz: mx.array, a: mx.array
) -> mx.array:
    """The gradient with respect to an input that layers share: through their bases, plus dz^T @ a.

    dz is (ranks, rows), a (ranks, width) and g each layer's output gradient. Of x only shape and
    dtype matter, since bases are linear. The gradient has its dtype: a float32 base in a bfloat16
    model gives float32, which MLX hands on as it is.
    """
    operations = device_operations()
    if operations.can_add_low_rank_products(x, [a]):
        base = base_input_gradient(layers, x, g)
        (gradient,) = operations.add_low_rank_products([base], [dz], [a])
    else:
        gradient = base_input_gradient(layers, x, g, dz.T @ a)
    return gradient.astype(x.dtype)


def base_input_gradient(
    layers: Sequence[AdapterLinear],
    x: mx.array,
    g: Sequence[mx.array],
    added: mx.array | None = None,
) -> mx.array:
    """The sum of the gradients through the frozen base layers, and of `added`."""
    total = add_to_base_gradient(layers[0], x, g[0], added)
    for layer, gradient in zip(layers[1:], g[1:], strict=True):
        total = add_to_base_gradient(layer, x, gradient, total)
    return total


def add_to_base_output(layer: AdapterLinear, x: mx.array, added: mx.array) -> mx.array:
    """The base layer's output plus `added`, in one matmul where the base is one."""
    base = layer.linear
    if type(base) is nn.Linear and "bias" not in base:
        return mx.addmm(added, x, base.weight.T)
    return base(x) + added


def add_to_base_gradient(
    layer: AdapterLinear, x: mx.array, g: mx.array, added: mx.array | None
) -> mx.array:
    """The gradient through a base layer of any class, plus `added`."""
    if type(layer.linear) is nn.Linear:
        weight = layer.linear.weight
        return g @ weight if added is None else mx.addmm(added, g, weight)
    gradient: mx.array
    (gradient,) = mx.vjp(layer.linear, [x], [g])[1]
    return gradient if added is None else added + gradient


@contextmanager
def using_optimized_lora_layers(
    model: nn.Module, groups: Sequence[Sequence[nn.Module]] = ()
) -> Iterator[None]:
    """Compute a model's LoRA and DoRA layers here; the layers of a group share one input."""
    layers: list[Any] = [m for _, m in model.named_modules() if type(m) in OPTIMIZED_CLASSES]
    originals = {id(layer): type(layer) for layer in layers}
    ranks = {id(layer): layer.lora_b.shape[0] for layer in layers}
    group_ranks = (sum(ranks.get(id(layer), 0) for layer in group) for group in groups)
    device_operations().check_kernels([*ranks.values(), *group_ranks])
    try:
        for layer in layers:
            if type(layer) is DoRALinear:
                weight = layer._dequantized_weight().astype(mx.float32)
                norm = mx.square(weight).sum(axis=1)
                mx.eval(norm)  # one weight at a time
                object.__setattr__(layer, WEIGHT_NORM_ATTRIBUTE, norm)
            layer.__class__ = OPTIMIZED_CLASSES[type(layer)]
        for group in groups:
            shared = LayersSharingInput(cast(Any, group))
            for layer in group:
                object.__setattr__(layer, GROUP_ATTRIBUTE, shared)
        yield
    finally:
        for layer in layers:
            vars(layer).pop(GROUP_ATTRIBUTE, None)
            vars(layer).pop(WEIGHT_NORM_ATTRIBUTE, None)
            layer.__class__ = originals[id(layer)]
