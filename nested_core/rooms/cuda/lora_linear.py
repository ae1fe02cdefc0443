"""LoRA and DoRA layers with a backward pass of their own, which replace mlx-lm's during a block.

Base output and low-rank product are computed in one matmul or in one kernel. The scale is
applied to the narrow activations, and layers with the same input share its products. Modules keep
their identity, parameters and names; only their class changes, until the block ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from nested_core.kernels.views import split_rows, swap_axes
from nested_core.rooms.cuda import lora_add, lora_matmuls
from nested_core.rooms.cuda.concatenate import concatenate_rows
from nested_core.rooms.cuda.lora_add import LowRankSumTerms

GROUP_ATTRIBUTE = "_shared_input"
TRANSPOSED_WEIGHT_ATTRIBUTE = "_transposed_weight"
WEIGHT_NORM_ATTRIBUTE = "_squared_weight_norm"

AdapterLinear = LoRALinear | DoRALinear


class OptimizedLoRALinear(LoRALinear):
    """mlx_lm.tuner.lora.LoRALinear with the same parameters and, within rounding, the same output.

    If the dtype of the factors is not the input's, mlx-lm's own computation is used.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Compute the base output plus scale * dropout(x) @ lora_a @ lora_b."""
        if not x.dtype == self.lora_a.dtype == self.lora_b.dtype:
            return cast(mx.array, super().__call__(x))
        return compute_lora_output(self, x)


class OptimizedDoRALinear(DoRALinear):
    """mlx_lm.tuner.dora.DoRALinear with the same parameters and, within rounding, the same output.

    It is a LoRA layer whose outputs are multiplied by m / |W + scale B^T A^T|, the norm of each row
    (Liu et al. 2024, DoRA, arXiv 2402.09353, section 4.3: no gradient goes through the norm). The
    adapted weight is never built: its squared norm is |W|^2 + 2 scale (W A) B + scale^2 (A B)^T A
    B.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply the LoRA layer's output, without its bias, by m / norm, then add the bias."""
        if not x.dtype == self.lora_a.dtype == self.lora_b.dtype:
            return cast(mx.array, super().__call__(x))
        magnitude = (self.m / mx.stop_gradient(self._adapted_norm())).astype(x.dtype)
        output = magnitude * compute_lora_output(self, x)
        return output + (1 - magnitude) * self.linear.bias if "bias" in self.linear else output

    def _adapted_norm(self) -> mx.array:
        """Return the norm of each row of the adapted weight, float32 (outputs,)."""
        products = self.linear(self.lora_a.T).astype(mx.float32)  # (rank, outputs)
        if "bias" in self.linear:
            products = products - self.linear.bias
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        added = 2 * products + self.scale * ((a.T @ a) @ b)
        return mx.sqrt(vars(self)[WEIGHT_NORM_ATTRIBUTE] + self.scale * (added * b).sum(axis=0))


OUR_CLASSES: dict[type, type] = {LoRALinear: OptimizedLoRALinear, DoRALinear: OptimizedDoRALinear}


def compute_lora_output(layer: AdapterLinear, x: mx.array) -> mx.array:
    """Compute a layer's base output plus scale * dropout(x) @ lora_a @ lora_b."""
    dropped = layer.dropout(x)
    if dropped is not x:
        return compute_dropout_output(layer, x, dropped)
    group: LayersSharingInput = vars(layer).get(GROUP_ATTRIBUTE) or LayersSharingInput([layer])
    return group.layer_output(layer, x)


def compute_dropout_output(layer: AdapterLinear, x: mx.array, dropped: mx.array) -> mx.array:
    """Compute the output of a LoRA layer with active dropout, with a backward pass of its own.

    The output is the base layer's for `x` plus scale * (dropped @ lora_a) @ lora_b: only the
    low-rank part sees the dropout. x: the input; dropped: the input after dropout.
    """
    scale = layer.scale

    @mx.custom_function
    def project(x: mx.array, dropped: mx.array, a: mx.array, b: mx.array) -> list[mx.array]:
        """Return the output, and z = scale (dropped @ lora_a)^T for the backward pass.

        a: lora_a^T.
        """
        z = lora_matmuls.project_to_rank([(a, dropped)], scale)
        return [*add_low_rank_products([layer], x, [z], [b]), z]

    @project.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        """Compute the gradients of the input, the dropped input, lora_a^T and lora_b.

        primals: the arguments of `project`. cotangents: the gradients of its outputs.
        """
        x, dropped, a, b = primals
        g, z = cotangents[0], outputs[1]
        dz = lora_matmuls.project_to_rank([(b, g)], scale)
        dx = base_input_gradient([layer], x, [g]).astype(x.dtype)
        da, db = lora_matmuls.factor_gradients([(dz, dropped), (z, g)])
        return dx, dz.T @ a, da, db

    rows = [each.reshape(-1, each.shape[-1]) for each in (x, dropped)]
    outputs: Any = project(*rows, swap_axes(layer.lora_a, 0, 1), layer.lora_b)
    output: mx.array = outputs[0].reshape(*x.shape[:-1], -1)
    return output


class LayersSharingInput:
    """LoRA layers with one input: x @ [A1 A2 ...] is one product, and so is its gradient.

    With z = scale (x @ A)^T, an output is x W + z^T B. With g its gradient and dz = scale (g
    B^T)^T, the gradients are dz x for A^T, z g for B, and g W^T + dz^T A^T for x. The base layers
    are computed separately, so that no output keeps another's memory alive.
    """

    def __init__(self, layers: Sequence[AdapterLinear]) -> None:
        """Group layers of one scale; their ranks may differ."""
        self._layers = layers
        self._ranks = [layer.lora_b.shape[0] for layer in layers]
        self._input: mx.array | None = None
        self._outputs: dict[int, mx.array] = {}

    def layer_output(self, layer: AdapterLinear, x: mx.array) -> mx.array:
        """Return the output of one layer for the shared input.

        The first call with an input computes all layers' outputs; the last one releases them.
        """
        if self._input is not x or id(layer) not in self._outputs:
            self._input = x
            self._outputs = dict(zip(map(id, self._layers), self._compute_outputs(x), strict=True))
        output = self._outputs.pop(id(layer))
        if not self._outputs:
            self._input = None
        return output

    def _compute_outputs(self, x: mx.array) -> list[mx.array]:
        """Compute the outputs of all layers for an input, in the order of the layers.

        Each output is the base layer's plus scale * (x @ lora_a) @ lora_b. The products with all
        lora_a are computed as one, of the concatenated factors; `z` is that product, transposed and
        scaled (summed ranks, positions).

        x: (..., width).
        """
        layers, ranks = self._layers, self._ranks
        count, scale = len(layers), layers[0].scale

        @mx.custom_function
        def project(x: mx.array, *factors: mx.array) -> list[mx.array]:
            """Return each layer's output, then all lora_a^T and each z for the backward pass."""
            a = concatenate_rows(factors[:count])
            parts = split_rows(lora_matmuls.project_to_rank([(a, x)], scale), ranks)
            return [*add_low_rank_products(layers, x, parts, factors[count:]), a, *parts]

        @project.vjp
        def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
            """Compute the gradients of the input, then of all lora_a^T, then of all lora_b.

            primals: the arguments of `project`. cotangents: the gradients of its outputs.
            """
            x, b = primals[0], primals[1 + count :]
            g = cotangents[:count]
            a, *parts = outputs[count:]
            dz = lora_matmuls.project_to_rank(list(zip(b, g, strict=True)), scale)
            dx = input_gradient(layers, x, g, dz, a)
            da, *db = lora_matmuls.factor_gradients([(dz, x), *zip(parts, g, strict=True)])
            return dx, *split_rows(da, ranks), *db

        factors = [swap_axes(layer.lora_a, 0, 1) for layer in layers]
        factors += [layer.lora_b for layer in layers]
        outputs: Any = project(x.reshape(-1, x.shape[-1]), *factors)
        return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs[:count]]


def add_low_rank_products(
    layers: Sequence[AdapterLinear], x: mx.array, z: Sequence[mx.array], factors: Sequence[mx.array]
) -> Sequence[mx.array]:
    """Return each base layer's output plus z^T @ factor, of (rank, rows) and (rank, width).

    x: the input of the layers. z, factors: one of each for each layer.
    """
    if lora_add.can_use_lora_kernels(x, factors):
        return add_by_kernels([base_output(layer, x) for layer in layers], z, factors)
    products = [each.T @ b for each, b in zip(z, factors, strict=True)]
    return [add_to_base_output(layer, x, low) for layer, low in zip(layers, products, strict=True)]


def base_output(layer: AdapterLinear, x: mx.array) -> mx.array:
    """Return `layer.linear(x)`, in a plain Linear by its weight that is transposed already."""
    weight: mx.array | None = vars(layer).get(TRANSPOSED_WEIGHT_ATTRIBUTE)
    if weight is None:
        return cast(mx.array, layer.linear(x))
    return mx.addmm(layer.linear.bias, x, weight) if "bias" in layer.linear else x @ weight


def add_by_kernels(
    bases: Sequence[mx.array], z: Sequence[mx.array], factors: Sequence[mx.array]
) -> Sequence[mx.array]:
    """Return each base + z^T @ factor, of (rank, rows) and (rank, width), by kernels."""
    return lora_add.compute_low_rank_sums(list(map(LowRankSumTerms, bases, z, factors)))


def input_gradient(
    layers: Sequence[AdapterLinear], x: mx.array, g: Sequence[mx.array], dz: mx.array, a: mx.array
) -> mx.array:
    """Return the gradient of the input that layers share: through their bases, plus dz^T @ a.

    dz: (ranks, rows); a: (ranks, width); g: each layer's output gradient.
    x: the input, for its shape and dtype, since bases are linear. The gradient is cast to x's
        dtype, because a float32 base in a bfloat16 model gives float32.
    """
    if lora_add.can_use_lora_kernels(x, [a]):
        (gradient,) = add_by_kernels([base_input_gradient(layers, x, g)], [dz], [a])
    else:
        gradient = base_input_gradient(layers, x, g, dz.T @ a)
    return gradient.astype(x.dtype)


def base_input_gradient(
    layers: Sequence[AdapterLinear],
    x: mx.array,
    g: Sequence[mx.array],
    added: mx.array | None = None,
) -> mx.array:
    """Sum the input's gradients through the frozen base layers, and `added` if given."""
    total = add_to_base_gradient(layers[0], x, g[0], added)
    for layer, gradient in zip(layers[1:], g[1:], strict=True):
        total = add_to_base_gradient(layer, x, gradient, total)
    return total


def add_to_base_output(layer: AdapterLinear, x: mx.array, added: mx.array) -> mx.array:
    """Compute the base layer's output plus `added`, in one matmul if the base is a plain Linear."""
    base = layer.linear
    if type(base) is nn.Linear and "bias" not in base:
        return mx.addmm(added, x, base.weight.T)
    return base(x) + added


def add_to_base_gradient(
    layer: AdapterLinear, x: mx.array, g: mx.array, added: mx.array | None
) -> mx.array:
    """Return the input's gradient through a base layer of any class, plus `added` if given.

    g: the gradient of the base layer's output.
    """
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
    """Replace a model's LoRA and DoRA layers by the optimized classes during the block.

    A layer keeps its parameters: only its class is exchanged, and what the optimized class needs
    beside them is attached. Attributes are set with `object.__setattr__` because mlx would take
    them for parameters of the module.

    groups: layers that share one input, and are computed together.
    """
    layers: list[Any] = [m for _, m in model.named_modules() if type(m) in OUR_CLASSES]
    originals = {id(layer): type(layer) for layer in layers}
    ranks = {id(layer): layer.lora_b.shape[0] for layer in layers}
    group_ranks = (sum(ranks.get(id(layer), 0) for layer in group) for group in groups)
    # Kernels are made for certain ranks; a group is computed like one layer of their summed rank.
    lora_matmuls.check_lora_kernels([*ranks.values(), *group_ranks])
    try:
        for layer in layers:
            if type(layer) is DoRALinear:
                weight = layer._dequantized_weight().astype(mx.float32)
                norm = mx.square(weight).sum(axis=1)
                mx.eval(norm)  # one weight at a time
                object.__setattr__(layer, WEIGHT_NORM_ATTRIBUTE, norm)
            if type(layer.linear) is nn.Linear:
                object.__setattr__(layer, TRANSPOSED_WEIGHT_ATTRIBUTE, layer.linear.weight.T)
            layer.__class__ = OUR_CLASSES[type(layer)]
        mx.eval([vars(layer).get(TRANSPOSED_WEIGHT_ATTRIBUTE) for layer in layers])
        for group in groups:
            shared = LayersSharingInput(cast(Any, group))
            for layer in group:
                object.__setattr__(layer, GROUP_ATTRIBUTE, shared)
        yield
    finally:
        for layer in layers:
            vars(layer).pop(GROUP_ATTRIBUTE, None)
            vars(layer).pop(WEIGHT_NORM_ATTRIBUTE, None)
            vars(layer).pop(TRANSPOSED_WEIGHT_ATTRIBUTE, None)
            layer.__class__ = originals[id(layer)]
