"""Pack a tier's many small tensors into one vector, and unpack them by name.

An adapter has hundreds of tensors, and an optimizer runs some ten kernels for each; on a GPU that
takes as long as the rest of a step. An elementwise optimizer gives the same values for one vector.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from nested_core import backend
from nested_core.kernels.device_operations import device_operations
from nested_core.kernels.views import split_rows, swap_axes
from nested_core.models.parameters import ParameterRefs, read_parameters
from nested_core.optim.gradients import (
    HAD_GRADIENT,
    Flat,
    StateByParameter,
    optimizer_state_by_parameter,
)
from nested_core.optim.named_updates import UNSIGNED_DTYPE_BY_BYTES, flatten
from nested_core.optim.tier_assignment import TierMap
from nested_core.optim.tier_counters import RESERVED_NAMES
from nested_core.optim.tiered import Tiered

ALIGNMENT = 8  # elements; 16 bytes in bfloat16


def unflatten_names(flat: Flat) -> Any:
    """Turn a dictionary with dotted names into the nested tree that an optimizer expects.

    `{"a.b": x}` becomes `{"a": {"b": x}}`.
    """
    return tree_unflatten(list(flat.items())) if flat else {}


@dataclass(frozen=True)
class PackedArray:
    """The layout of an array that holds tensors of one tier: a vector, or a single tensor as it is.

    A matrix is stored in the vector with its short side first, as products with a lora_a read it.
    If a tensor's size is no multiple of ALIGNMENT, splitting copies the tensors, because kernels
    load 16 bytes at a time from addresses that must be multiples of 16.
    """

    tier: int
    shapes: Mapping[str, tuple[int, ...]]

    def pack(self, values: Mapping[str, mx.array]) -> mx.array:
        """Return the tensors, given by name, as one array."""
        return self.join(self.turn({name: values[name] for name in self.shapes}))

    def join(self, stored: Mapping[str, mx.array]) -> mx.array:
        """Return the tensors, given by name as `split` returns them, as one array."""
        tensors = [stored[name] for name in self.shapes]
        return (
            tensors[0] if len(tensors) == 1 else device_operations().concatenate_flattened(tensors)
        )

    def unpack(self, array: mx.array) -> Flat:
        """Return the tensors by name; they are views of the array if all of them are aligned."""
        return self.turn(self.split(array))

    def turn(self, tensors: Mapping[str, mx.array]) -> Flat:
        """Return tensors in their own shapes as they are stored, or the other way round."""
        return {n: swap_axes(t, 0, 1) if self._is_turned(n) else t for n, t in tensors.items()}

    def split(self, array: mx.array) -> Flat:
        """Return the tensors by name as they are stored; those with equally long rows at once."""
        if len(self.shapes) == 1:
            return {next(iter(self.shapes)): array}
        shapes = {n: s[::-1] if self._is_turned(n) else s for n, s in self.shapes.items()}
        ends = accumulate(map(math.prod, shapes.values()))
        is_aligned = all(end % ALIGNMENT == 0 for end in ends)

        def row_length(name: str) -> tuple[int, str]:
            return _stored_row_length(shapes[name]), "" if is_aligned else name

        tensors: Flat = {}
        start = 0
        for (width, _), run in groupby(shapes, row_length):
            names = list(run)
            counts = [math.prod(shapes[name]) // width for name in names]
            end = start + sum(counts) * width
            part = array[start:end] if is_aligned else array[mx.arange(start, end)]
            rows = split_rows(part.reshape(-1, width), counts)
            tensors |= {n: t.reshape(shapes[n]) for n, t in zip(names, rows, strict=True)}
            start = end
        return tensors

    def _is_turned(self, name: str) -> bool:
        """Return whether a tensor is a matrix with more rows than columns, among others."""
        shape = self.shapes[name]
        return len(self.shapes) > 1 and len(shape) == 2 and shape[0] > shape[1]

    def count_changes(self, before: mx.array, after: mx.array) -> mx.array:
        """Count for each tensor the elements whose bits differ, int32 (tensors,), in order."""
        unsigned = UNSIGNED_DTYPE_BY_BYTES[before.dtype.size]
        is_changed = (before.view(unsigned) != after.view(unsigned)).reshape(-1)
        ends = accumulate(math.prod(shape) for shape in self.shapes.values())
        counts_so_far = mx.cumsum(is_changed.astype(mx.int32))[mx.array(list(ends)) - 1]
        return mx.concatenate([counts_so_far[:1], mx.diff(counts_so_far)])


def _stored_row_length(shape: tuple[int, ...]) -> int:
    """Return the length of a tensor's rows in the vector, which of a matrix is its long side."""
    return max(shape) if len(shape) == 2 else shape[-1] if shape else 1


class Packing:
    """Which trainable tensors are packed into which array; also packs the optimizer's state.

    Args:
        values: the trainable tensors by dotted name.
        tiers: the tier of each tensor.
        by_tier: pack each tier into one vector. Otherwise each tensor stays as it is. An optimizer
            that depends on a tensor's shape requires that, and large tensors do not gain by
            packing.
    """

    def __init__(self, values: Mapping[str, mx.array], tiers: TierMap, *, by_tier: bool) -> None:
        """Decide which tensors are packed together: all of a tier if `by_tier`, else none."""
        self.by_tier = by_tier
        self.arrays: dict[str, PackedArray] = {}
        shapes = {name: value.shape for name, value in values.items()}
        if not by_tier:
            for name, shape in shapes.items():
                self.arrays[name] = PackedArray(tiers.tensors[name], {name: shape})
            return
        for tier in sorted({tiers.tensors[name] for name in shapes}):
            of_tier = {name: shapes[name] for name in shapes if tiers.tensors[name] == tier}
            if backend.computes_on_cuda():  # by the length of stored rows, to be split at once
                of_tier = dict(sorted(of_tier.items(), key=lambda one: _stored_row_length(one[1])))
            self.arrays[f"tier{tier}"] = PackedArray(tier, of_tier)

    def pack(self, values: Mapping[str, mx.array]) -> Flat:
        """Return all packed arrays, given all tensors by name."""
        return {key: array.pack(values) for key, array in self.arrays.items()}

    def unpack(self, packed: Mapping[str, mx.array]) -> Flat:
        """Return the tensors of the given packed arrays, by name."""
        return self.turn(self.split(packed))

    def split(self, packed: Mapping[str, mx.array]) -> Flat:
        """Return the tensors of the given packed arrays by name, as they are stored."""
        parts = [self.arrays[key].split(array) for key, array in packed.items()]
        return {name: tensor for tensors in parts for name, tensor in tensors.items()}

    def turn(self, tensors: Mapping[str, mx.array]) -> Flat:
        """Return tensors in their own shapes as they are stored, or the other way round."""
        turned: Flat = {}
        for array in self.arrays.values():
            turned |= array.turn({n: tensors[n] for n in array.shapes if n in tensors})
        return turned

    def find_unmoved(self, before: Mapping[str, mx.array], after: Flat) -> list[str]:
        """Return the names of tensors whose bits are the same in packed arrays before and after.

        This takes a few operations for each packed array, however many tensors it holds, and one
        evaluation.
        """
        changed = [self.arrays[key].count_changes(old, after[key]) for key, old in before.items()]
        counts: Any = mx.concatenate(changed).tolist() if changed else []
        names = [name for key in before for name in self.arrays[key].shapes]
        return [name for name, count in zip(names, counts, strict=True) if count == 0]

    def keys_of_tiers(self, tiers: tuple[int, ...]) -> frozenset[str]:
        """Return the keys of the packed arrays that belong to the given tiers."""
        return frozenset(key for key, array in self.arrays.items() if array.tier in tiers)

    def pack_optimizer(self, optimizer: Tiered, values: Flat) -> Tiered:
        """Return an optimizer with the same state, in which each packed array is one parameter.

        A packed array holds many small tensors of one tier, so that one update serves them all. The
        state of each is packed in the same order. If nothing is packed, the optimizer itself is
        returned. `values` are the tensors by name.
        """
        if not self.by_tier:
            return optimizer
        packed = copy.copy(optimizer)
        packed.tiers = tuple(
            replace(tier, names=self.keys_of_tiers((i,))) for i, tier in enumerate(optimizer.tiers)
        )
        states = optimizer_state_by_parameter(unflatten_names(values), optimizer.state)
        shared = {key: optimizer.state[key] for key in RESERVED_NAMES if key in optimizer.state}
        packed.state = shared
        for key, array, parts in self._arrays_with_moment_names(states):
            packed.state[key] = {}
            for part in parts:
                shapes = array.shapes.items()
                values_of = {n: mx.broadcast_to(states[n][part], shape) for n, shape in shapes}
                packed.state[key][part] = array.pack(values_of)
        packed.init(self.pack(values))
        return packed

    def copy_step_and_learning_rate(self, packed: Tiered, optimizer: Tiered) -> None:
        """Copy step, learning rate and counters from `packed` to the optimizer by name."""
        for key in RESERVED_NAMES:
            if key in packed.state:
                optimizer.state[key] = packed.state[key]

    def unpack_optimizer(self, packed: Tiered, states: StateByParameter) -> None:
        """Write the packed optimizer's moments into `states`, by parameter name.

        `states` is a result of `optimizer_state_by_parameter`. Does nothing if nothing is packed.
        """
        if not self.by_tier:
            return
        for key, array, parts in self._arrays_with_moment_names(states):
            for part in parts:
                for name, view in array.unpack(packed.state[key][part]).items():
                    # the mark is a scalar by name, and has an element for each weight if packed
                    states[name][part] = mx.max(view) if part == HAD_GRADIENT else view

    def _arrays_with_moment_names(
        self, states: Mapping[str, Any]
    ) -> Iterator[tuple[str, PackedArray, list[str]]]:
        """Yield each packed array's key, layout and the names of its moments, such as "m", "v"."""
        for key, array in self.arrays.items():
            yield key, array, list(states[next(iter(array.shapes))])


def make_packing(values: Flat, tiers: TierMap, optimizer: Tiered, *, pack_by_tier: bool) -> Packing:
    """Build a packing by tier if `pack_by_tier` is set and the optimizer is elementwise.

    Otherwise each tensor stays as it is.
    """
    return Packing(values, tiers, by_tier=pack_by_tier and optimizer.is_elementwise)


class PackedState:
    """The packed parameters and the packed optimizer that training steps advance.

    Between reports, evaluations and checkpoints only these change. The model's parameters and the
    optimizer by name keep the values last written into them.
    """

    def __init__(
        self, parameters: ParameterRefs, optimizer: Tiered, tiers: TierMap, *, pack_by_tier: bool
    ) -> None:
        """Pack the parameters of a model and the state of its optimizer."""
        values = read_parameters(parameters)
        self.packing = make_packing(values, tiers, optimizer, pack_by_tier=pack_by_tier)
        self.parameters = self.packing.pack(values)
        self.optimizer = self.packing.pack_optimizer(optimizer, values)
        self._named_optimizer = optimizer
        self._named_states = optimizer_state_by_parameter(unflatten_names(values), optimizer.state)
        mx.eval(self.parameters, self.optimizer.state)

    def update(self, updates: Flat) -> None:
        """Replace packed parameters by their new values after the packed optimizer's step."""
        self.parameters = self.parameters | updates
        self.packing.copy_step_and_learning_rate(self.optimizer, self._named_optimizer)

    def arrays(self) -> Flat:
        """Return every array that the next step starts from; they must be equal on all ranks."""
        return self.parameters | flatten(self.optimizer.state)

    def unpack(self) -> Flat:
        """Return the parameters by name, and write the state into the optimizer by name."""
        self.packing.unpack_optimizer(self.optimizer, self._named_states)
        return self.packing.unpack(self.parameters)
