"""Many small tensors as few vectors: one a tier, so that an optimizer step is a handful of kernels.

An adapter has hundreds of tensors, and an optimizer with checks takes some ten kernels for each; on
a GPU that is as long as the rest of a step. Adam is elementwise, so a vector gives the same values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from nested_core.kernels.cuda.concatenate import concatenated
from nested_core.optim.clock import RESERVED_NAMES
from nested_core.optim.gradients import HAD_GRADIENT, Flat, LeafStates, leaf_states
from nested_core.optim.tiered import Tiered
from nested_core.optim.tiers import TierMap

ALIGNED = 8  # elements: 16 bytes of a bfloat16


def nested(flat: Flat) -> Any:
    """A flat dictionary of dotted names as the tree that the optimizer's state mirrors."""
    return tree_unflatten(list(flat.items())) if flat else {}


@dataclass(frozen=True)
class Leaf:
    """Tensors of one tier that are kept as one array: a vector, or the one tensor as it is.

    A matrix lies in the vector with its short side first, as products with a lora_a want it. Where
    a size is no multiple of ALIGNED, what is cut out of the vector is copied: kernels load 16 bytes
    at a time, from an address that has to be a multiple of that.
    """

    tier: int
    shapes: Mapping[str, tuple[int, ...]]

    def join(self, values: Mapping[str, mx.array]) -> mx.array:
        """The tensors in one array."""
        if len(self.shapes) == 1:
            return values[next(iter(self.shapes))]
        return concatenated([_folded(values[name]) for name in self.shapes])

    def cut(self, array: mx.array) -> Flat:
        """The tensors by name, as views."""
        if len(self.shapes) == 1:
            return {next(iter(self.shapes)): array}
        ends = list(accumulate(math.prod(shape) for shape in self.shapes.values()))
        ranges = pairwise([0, *ends])
        is_aligned = all(end % ALIGNED == 0 for end in ends)
        return {
            name: _unfolded(array[start:end] if is_aligned else array[mx.arange(start, end)], shape)
            for (name, shape), (start, end) in zip(self.shapes.items(), ranges, strict=True)
        }


def _is_tall(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] > shape[1]


def _folded(array: mx.array) -> mx.array:
    return array.T if _is_tall(array.shape) else array


def _unfolded(vector: mx.array, shape: tuple[int, ...]) -> mx.array:
    return vector.reshape(shape[::-1]).T if _is_tall(shape) else vector.reshape(shape)


class Packing:
    """Which trainable tensors are kept together, and the optimizer's state for them.

    Args:
        values: the trainable tensors by dotted name.
        tiers: the tier of each.
        joins: whether a tier's tensors become one vector; else each stays what it is, as it must
            where the optimizer looks at a tensor's shape, and should where tensors are large.
    """

    def __init__(self, values: Mapping[str, mx.array], tiers: TierMap, *, joins: bool) -> None:
        self.joins = joins
        shapes = {name: value.shape for name, value in values.items()}
        if not joins:
            self.leaves = {n: Leaf(tiers.tensors[n], {n: shape}) for n, shape in shapes.items()}
            return
        self.leaves = {}
        for tier in sorted({tiers.tensors[name] for name in shapes}):
            own = {name: shapes[name] for name in shapes if tiers.tensors[name] == tier}
            self.leaves[f"tier{tier}"] = Leaf(tier, own)

    def pack(self, values: Mapping[str, mx.array]) -> Flat:
        """Every tensor, in the arrays that are kept."""
        return {key: leaf.join(values) for key, leaf in self.leaves.items()}

    def unpack(self, packed: Mapping[str, mx.array]) -> Flat:
        """The tensors of some of the arrays, by name."""
        return {
            n: v for key, array in packed.items() for n, v in self.leaves[key].cut(array).items()
        }

    def names(self, key: str) -> Mapping[str, tuple[int, ...]]:
        """The tensors in one of the arrays, with their shapes."""
        return self.leaves[key].shapes

    def of_tiers(self, tiers: tuple[int, ...]) -> frozenset[str]:
        """The keys of the arrays that belong to some tiers."""
        return frozenset(key for key, leaf in self.leaves.items() if leaf.tier in tiers)

    def pack_optimizer(self, optimizer: Tiered, values: Flat) -> Tiered:
        """An optimizer of the same formula and the same state for what is kept together."""
        if not self.joins:
            return optimizer
        twin = copy.copy(optimizer)
        twin.tiers = tuple(
            replace(tier, names=self.of_tiers((i,))) for i, tier in enumerate(optimizer.tiers)
        )
        states = leaf_states(nested(values), optimizer.state)
        shared = {key: optimizer.state[key] for key in RESERVED_NAMES if key in optimizer.state}
        twin.state = shared | {
            key: {
                part: leaf.join(
                    {n: mx.broadcast_to(states[n][part], shape) for n, shape in leaf.shapes.items()}
                )
                for part in parts
            }
            for key, leaf, parts in self._parts(states)
        }
        twin.init(self.pack(values))
        return twin

    def share_clock(self, twin: Tiered, optimizer: Tiered) -> None:
        """Give the optimizer its twin's clock, learning rate and counters."""
        for key in RESERVED_NAMES:
            if key in twin.state:
                optimizer.state[key] = twin.state[key]

    def unpack_optimizer(self, twin: Tiered, states: LeafStates) -> None:
        """Put the moments that a twin has reached into an optimizer's `leaf_states`, by name."""
        if not self.joins:
            return
        for key, leaf, parts in self._parts(states):
            for part in parts:
                for name, view in leaf.cut(twin.state[key][part]).items():
                    states[name][part] = mx.max(view) if part == HAD_GRADIENT else view

    def _parts(self, states: Mapping[str, Any]) -> Iterator[tuple[str, Leaf, list[str]]]:
        """Each array that is kept, with the names of its moments."""
        for key, leaf in self.leaves.items():
            yield key, leaf, list(states[next(iter(leaf.shapes))])


def packing_for(values: Flat, tiers: TierMap, optimizer: Tiered, *, small: bool) -> Packing:
    """Vectors where the optimizer is elementwise and the tensors are small, as an adapter's are."""
    return Packing(values, tiers, joins=small and optimizer.is_elementwise)
