"""Gradient clipping: by the global norm of the gradients of the tiers that are due."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from nested_core.optim.gradient_checks import Flat


def norm_of_due_gradients(groups: Mapping[int, Flat], due: Mapping[int, mx.array]) -> mx.array:
    """The global L2 norm, float32, over the gradients of the tiers that are due."""
    squares = [mx.array(0.0)]
    for i, group in groups.items():
        square = sum(mx.square(g.astype(mx.float32)).sum() for g in group.values())
        squares.append(mx.where(due[i], square, 0.0))
    return mx.sqrt(mx.sum(mx.stack(squares)))


def clip_factor(norm: mx.array, max_norm: float) -> mx.array:
    """min(1, max_norm / (norm + 1e-6)), as in mlx.optimizers.clip_grad_norm."""
    return mx.minimum(max_norm / (norm + 1e-6), 1.0)


def clip_gradients(groups: Mapping[int, Flat], norm: mx.array, max_norm: float) -> dict[int, Flat]:
    """Every tier's gradients times `clip_factor` of their global norm, in their own dtypes."""
    factor = clip_factor(norm, max_norm)
    return {
        tier: {name: gradient * factor.astype(gradient.dtype) for name, gradient in group.items()}
        for tier, group in groups.items()
    }
