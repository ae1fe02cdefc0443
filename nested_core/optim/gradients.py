"""Gradients as flat dictionaries of dotted names: check, test for finiteness, clip by norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

Flat = dict[str, mx.array]
ArraySpec = tuple[tuple[int, ...], mx.Dtype]  # shape and dtype
Flags = dict[int, mx.array]
StateByParameter = dict[str, dict[str, mx.array]]
Array = TypeVar("Array")

HAD_GRADIENT = "had_gradient"


def shapes_and_dtypes(arrays: Mapping[str, mx.array]) -> dict[str, ArraySpec]:
    """Return shape and dtype of each array, by name."""
    return {name: (value.shape, value.dtype) for name, value in arrays.items()}


def optimizer_state_by_parameter(tree: object, state: object) -> StateByParameter:
    """Return the optimizer's state of each parameter, by dotted name.

    tree: parameters or gradients, whose leaves select the states.
    """
    states: StateByParameter = {}
    tree_map_with_path(lambda name, _, leaf: states.setdefault(name, leaf), tree, state)
    return states


def find_gradient_mark(state: Mapping[str, Array], name: str) -> Array | None:
    """Return the array that tells whether a parameter ever had a gradient that was not zero.

    It stays all zero until the first update with such a gradient. It is the mark that `Tiered`
    stores, or Adam's second moment; None if there is neither.

    state: an optimizer's flattened state, in memory or from a file.
    """
    return state.get(f"{name}.{HAD_GRADIENT}", state.get(f"{name}.v"))


def flatten_gradients(gradients: object) -> Flat:
    """Flatten a tree of gradients to a dictionary by dotted name.

    Raises ValueError for the (gradients, norm) pair of mlx's clip_grad_norm, and for leaves that
    are not arrays.
    """
    if isinstance(gradients, tuple):
        raise ValueError(
            "Expected a tree of gradients, got a tuple. clip_grad_norm returns the pair "
            "(gradients, norm): pass its first element."
        )
    flat = dict(tree_flatten(gradients))
    strange = [
        f"{name} is a {type(g).__name__}" for name, g in flat.items() if not isinstance(g, mx.array)
    ]
    if strange:
        raise ValueError(f"Gradients should be arrays: {', '.join(strange[:3])}.")
    return flat


def check_gradients(gradients: Flat, parameters: Flat, specs: Mapping[str, ArraySpec]) -> None:
    """Raise ValueError, listing every gradient that does not fit its parameter.

    specs: shape and dtype of each parameter when the optimizer was initialized.
    """
    misfits = {
        name: _describe_misfit(gradient, parameters.get(name), specs.get(name))
        for name, gradient in gradients.items()
    }
    problems = [f"  {name}: {misfit}" for name, misfit in misfits.items() if misfit]
    if problems:
        raise ValueError("Gradients do not fit the parameters:\n" + "\n".join(problems[:10]))


def _describe_misfit(
    gradient: mx.array, parameter: mx.array | None, initial: ArraySpec | None
) -> str | None:
    """Describe why a gradient does not fit its parameter; None if it does."""
    if parameter is None:
        return "there is no such parameter"
    if initial is None:
        return "the optimizer was not initialised with this parameter"
    if gradient.shape != parameter.shape:
        return f"gradient shape {gradient.shape}, parameter shape {parameter.shape}"
    if gradient.dtype != parameter.dtype:
        return f"gradient dtype {gradient.dtype}, parameter dtype {parameter.dtype}"
    shape, dtype = initial
    if gradient.shape != shape:
        return f"shape {gradient.shape} now, {shape} when the optimizer was initialised"
    if gradient.dtype != dtype:
        return f"dtype {gradient.dtype} now, {dtype} when the optimizer was initialised"
    return None


def check_flushed_parameters(parameters: Flat, specs: Mapping[str, ArraySpec]) -> None:
    """Raise ValueError, listing every parameter whose shape or dtype is not the one in `specs`."""
    given = shapes_and_dtypes(parameters)
    problems = [
        f"  {name}: {given.get(name, 'missing')}, expected {spec}"
        for name, spec in specs.items()
        if given.get(name) != spec
    ]
    if problems:
        raise ValueError(
            "flush needs every parameter whose gradients are gathered, as it was at init:\n"
            + "\n".join(problems[:10])
        )


def group_gradients_by_tier(
    gradients: Flat, owners: Mapping[str, int], *, every_tier: bool = False
) -> dict[int, Flat]:
    """Group gradients by tier, in the order of the tiers.

    owners: the tier of each parameter.

    Raises ValueError if some gradients of a tier are missing; with `every_tier`, also if a whole
    tier's are.
    """
    given = set(owners.values()) if every_tier and gradients else {owners[n] for n in gradients}
    missing = [name for name, i in owners.items() if i in given and name not in gradients]
    if missing:
        raise ValueError(
            f"{len(missing)} gradients are missing, {missing[:3]} among them: gradients come for "
            f'whole tiers, and for all of them where slow_gradients is "accumulate".'
        )
    groups: dict[int, Flat] = {i: {} for i in sorted(given)}
    for name, gradient in gradients.items():
        groups[owners[name]][name] = gradient
    return groups


def all_finite(arrays: Iterable[mx.array]) -> mx.array:
    """Return a flag on the device: whether every element of every array is finite."""
    return mx.all(mx.stack([mx.array(True), *(mx.all(mx.isfinite(array)) for array in arrays)]))


def used_gradients_finite(groups: Mapping[int, Flat], unused: Mapping[int, mx.array]) -> mx.array:
    """Return a flag on the device: whether all gradients that will be used are finite.

    unused: for some tiers, a flag that the tier's gradients are not used.
    """
    checks = [mx.array(True)]
    for i, group in groups.items():
        finite = all_finite(group.values())
        checks.append(mx.logical_or(finite, unused[i]) if i in unused else finite)
    return mx.all(mx.stack(checks))


def norm_of_due_gradients(groups: Mapping[int, Flat], due: Mapping[int, mx.array]) -> mx.array:
    """Return the global L2 norm, float32, of the gradients of the tiers that are due."""
    squares = [mx.array(0.0)]
    for i, group in groups.items():
        square = sum(mx.square(g.astype(mx.float32)).sum() for g in group.values())
        squares.append(mx.where(due[i], square, 0.0))
    return mx.sqrt(mx.sum(mx.stack(squares)))


def clip_factor(norm: mx.array, max_norm: float) -> mx.array:
    """Return min(1, max_norm / (norm + 1e-6)), as mlx.optimizers.clip_grad_norm computes it."""
    return mx.minimum(max_norm / (norm + 1e-6), 1.0)


def clip_gradients(groups: Mapping[int, Flat], norm: mx.array, max_norm: float) -> dict[int, Flat]:
    """Scale the gradients of all tiers so that their global norm is at most `max_norm`.

    norm: the global norm before clipping. Dtypes are kept.
    """
    factor = clip_factor(norm, max_norm)
    return {
        tier: {name: gradient * factor.astype(gradient.dtype) for name, gradient in group.items()}
        for tier, group in groups.items()
    }
