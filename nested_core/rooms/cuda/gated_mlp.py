"""The middle of a gated MLP with LoRA: silu(gate) * up, each a base output plus a low-rank product.

On CUDA it is one pass over gate and up forwards, and one backwards, which recomputes the product
for the gradient of the layer that reads it, so that it need not be kept.
"""

from __future__ import annotations

import mlx.core as mx

from nested_core.kernels.device_operations import RANKS_PER_TILE
from nested_core.kernels.self_check import checked_kernel
from nested_core.rooms.cuda import lora_add
from nested_core.rooms.cuda.kernel_launch import KERNEL_DTYPE, launch_kernel
from nested_core.rooms.cuda.lora_add import LowRankSumTerms, random_low_rank_sum_terms

GatedGradients = tuple[mx.array, mx.array, mx.array]  # of gate, of up; the product


def gated_product(gate: LowRankSumTerms, up: LowRankSumTerms) -> mx.array:
    """Compute silu(gate) * up in the dtype of gate's base, for factors that fit the kernels."""
    compute = gated_product_on_cuda if _have_kernel_dtype(gate, up) else gated_product_in_mlx
    return compute(gate, up)


def gated_gradients(
    gate: LowRankSumTerms, up: LowRankSumTerms, g: LowRankSumTerms
) -> GatedGradients:
    """Compute the gradients of gate and up, and the product again; g is its gradient."""
    compute = gated_gradients_on_cuda if _have_kernel_dtype(gate, up, g) else gated_gradients_in_mlx
    return compute(gate, up, g)


def _have_kernel_dtype(*sums: LowRankSumTerms) -> bool:
    return all(each.base.dtype == KERNEL_DTYPE for each in sums)


def gated_product_in_mlx(gate: LowRankSumTerms, up: LowRankSumTerms) -> mx.array:
    """Compute `gated_product` by MLX's operations."""
    a, b = gate.computed_in_float32(), up.computed_in_float32()
    return (a * mx.sigmoid(a) * b).astype(gate.base.dtype)


def gated_gradients_in_mlx(
    gate: LowRankSumTerms, up: LowRankSumTerms, g: LowRankSumTerms
) -> GatedGradients:
    """Compute `gated_gradients` by MLX's operations."""
    a, b, c = gate.computed_in_float32(), up.computed_in_float32(), g.computed_in_float32()
    s = mx.sigmoid(a)
    dtype = gate.base.dtype
    d_gate = c * b * (s + a * s * (1 - s))
    d_up = c * a * s
    product = a * s * b
    return d_gate.astype(dtype), d_up.astype(dtype), product.astype(dtype)


def _example_gate_up_gradient(
    tiles: int,
) -> list[tuple[LowRankSumTerms, LowRankSumTerms, LowRankSumTerms]]:
    """Make gate, up and gradient, with warps that compute rows more than once."""
    return [
        (
            random_low_rank_sum_terms(RANKS_PER_TILE * tiles, 4128),
            random_low_rank_sum_terms(RANKS_PER_TILE, 4128),
            random_low_rank_sum_terms(RANKS_PER_TILE, 4128),
        )
    ]


def _example_gate_up(tiles: int) -> list[tuple[LowRankSumTerms, LowRankSumTerms]]:
    return [(gate, up) for gate, up, _ in _example_gate_up_gradient(tiles)]


@checked_kernel("gated MLPs", reference=gated_product_in_mlx, examples=_example_gate_up)
def gated_product_on_cuda(gate: LowRankSumTerms, up: LowRankSumTerms) -> mx.array:
    """Compute `gated_product` in one kernel."""
    return _launch_gated_kernel("gated_product", 1, gate, up)[0]


@checked_kernel("gated MLPs", reference=gated_gradients_in_mlx, examples=_example_gate_up_gradient)
def gated_gradients_on_cuda(
    gate: LowRankSumTerms, up: LowRankSumTerms, g: LowRankSumTerms
) -> GatedGradients:
    """Compute `gated_gradients` in one kernel."""
    d_gate, d_up, product = _launch_gated_kernel("gated_gradients", 3, gate, up, g)
    return d_gate, d_up, product


def _launch_gated_kernel(name: str, outputs: int, *sums: LowRankSumTerms) -> list[mx.array]:
    """Launch the kernel of this name on one or more low-rank sums of the same shape.

    Returns `outputs` arrays of that shape.
    """
    rows, width = sums[0].base.shape
    steps, blocks = lora_add.warp_steps_and_grid(rows, width)
    return launch_kernel(
        name,
        [array for each in sums for array in each],
        [((rows, width), KERNEL_DTYPE)] * outputs,
        [rows, steps, width, *map(lora_add.count_rank_tiles, sums)],
        blocks=blocks,
        MOST=lora_add.kernel_tiles_for_sums(sums),
    )
