"""Gradients as flat dictionaries of dotted names: checked, measured and bounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

Flat = dict[str, mx.array]


def flatten_gradients(gradients: Any) -> Flat:
    """Gradients by dotted name; refuses the (gradients, norm) pair of mlx's clip_grad_norm."""
    if isinstance(gradients, tuple):
        raise ValueError(
            "Expected a tree of gradients, got a tuple. clip_grad_norm returns the pair "
            "(gradients, norm): pass its first element."
        )
    return dict(tree_flatten(gradients))


def check_gradients(
    gradients: Flat, parameters: Flat, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError, listing every gradient that fits no parameter.

    `shapes` are those that the optimizer was initialised with.
    """
    misfits = {
        name: _misfit(gradient, parameters.get(name), shapes.get(name))
        for name, gradient in gradients.items()
    }
    problems = [f"  {name}: {misfit}" for name, misfit in misfits.items() if misfit]
    if problems:
        raise ValueError("Gradients do not fit the parameters:\n" + "\n".join(problems[:10]))


def _misfit(
    gradient: mx.array, parameter: mx.array | None, shape: tuple[int, ...] | None
) -> str | None:
    if parameter is None:
        return "there is no such parameter"
    if shape is None:
        return "the optimizer was not initialised with this parameter"
    if gradient.shape != parameter.shape:
        return f"gradient shape {gradient.shape}, parameter shape {parameter.shape}"
    if gradient.dtype != parameter.dtype:
        return f"gradient dtype {gradient.dtype}, parameter dtype {parameter.dtype}"
    if gradient.shape != shape:
        return f"shape {gradient.shape} now, {shape} when the optimizer was initialised"
    return None


def group_by_tier(
    gradients: Flat, owners: Mapping[str, int], *, every_tier: bool = False
) -> dict[int, Flat]:
    """Gradients by tier, fastest first.

    Raises ValueError where only some of a tier's came, or, with `every_tier`, not every tier's.
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


def finite_where_used(groups: Mapping[int, Flat], unused: Mapping[int, mx.array]) -> mx.array:
    """Whether every gradient is finite, but for those of the tiers whose `unused` flag is set."""
    checks = [mx.array(True)]
    for i, group in groups.items():
        finite = mx.all(mx.stack([mx.all(mx.isfinite(g)) for g in group.values()]))
        checks.append(mx.logical_or(finite, unused[i]) if i in unused else finite)
    return mx.all(mx.stack(checks))


def due_norm(groups: Mapping[int, Flat], due: Mapping[int, mx.array]) -> mx.array:
    """The global L2 norm, float32, over the gradients of the tiers that are due."""
    squares = [mx.array(0.0)]
    for i, group in groups.items():
        square = sum(mx.square(g.astype(mx.float32)).sum() for g in group.values())
        squares.append(mx.where(due[i], square, 0.0))
    return mx.sqrt(mx.sum(mx.stack(squares)))


def clip_factor(norm: mx.array, max_norm: float) -> mx.array:
    """min(1, max_norm / (norm + 1e-6)), as in mlx.optimizers.clip_grad_norm."""
    return mx.minimum(max_norm / (norm + 1e-6), 1.0)
