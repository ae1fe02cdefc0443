"""The middle of a gated MLP with LoRA: silu(gate) * up, each a base output plus a low-rank product.

On CUDA it is one pass over gate and up forwards, and one backwards, which recomputes the product
for the gradient of the layer that reads it, so that it need not be kept.
"""

from __future__ import annotations

import mlx.core as mx

from nested_core.kernels.cuda import lora_add
from nested_core.kernels.cuda.launch import DTYPE, THREADS, launch
from nested_core.kernels.cuda.lora_add import LowRankSum, example_sum
from nested_core.kernels.cuda.self_check import checked_kernel
from nested_core.kernels.cuda.tiles import TILE

GatedGradients = tuple[mx.array, mx.array, mx.array]  # of gate, of up; the product


def gated_product(gate: LowRankSum, up: LowRankSum) -> mx.array:
    """silu(gate) * up, in the dtype of gate's base, for factors that fit the kernels."""
    compute = gated_product_on_cuda if _have_kernel_dtype(gate, up) else plain_gated_product
    return compute(gate, up)


def gated_gradients(gate: LowRankSum, up: LowRankSum, g: LowRankSum) -> GatedGradients:
    """The gradients with respect to gate and up, and the product again; g is its gradient."""
    compute = gated_gradients_on_cuda if _have_kernel_dtype(gate, up, g) else plain_gated_gradients
    return compute(gate, up, g)


def _have_kernel_dtype(*sums: LowRankSum) -> bool:
    return all(each.base.dtype == DTYPE for each in sums)


def plain_gated_product(gate: LowRankSum, up: LowRankSum) -> mx.array:
    """`gated_product` in MLX's operations."""
    a, b = gate.in_float32(), up.in_float32()
    return (a * mx.sigmoid(a) * b).astype(gate.base.dtype)


def plain_gated_gradients(gate: LowRankSum, up: LowRankSum, g: LowRankSum) -> GatedGradients:
    """`gated_gradients` in MLX's operations."""
    a, b, c = gate.in_float32(), up.in_float32(), g.in_float32()
    s = mx.sigmoid(a)
    dtype = gate.base.dtype
    d_gate = c * b * (s + a * s * (1 - s))
    d_up = c * a * s
    product = a * s * b
    return d_gate.astype(dtype), d_up.astype(dtype), product.astype(dtype)


def _examples(tiles: int) -> list[tuple[LowRankSum, LowRankSum, LowRankSum]]:
    """Gate, up and gradient, with warps that compute rows more than once."""
    return [(example_sum(TILE * tiles, 4128), example_sum(TILE, 4128), example_sum(TILE, 4128))]


def _product_examples(tiles: int) -> list[tuple[LowRankSum, LowRankSum]]:
    return [(gate, up) for gate, up, _ in _examples(tiles)]


@checked_kernel("gated MLPs", reference=plain_gated_product, examples=_product_examples)
def gated_product_on_cuda(gate: LowRankSum, up: LowRankSum) -> mx.array:
    """`gated_product` in one kernel."""
    return _launch("mlp", 1, gate, up)[0]


@checked_kernel("gated MLPs", reference=plain_gated_gradients, examples=_examples)
def gated_gradients_on_cuda(gate: LowRankSum, up: LowRankSum, g: LowRankSum) -> GatedGradients:
    """`gated_gradients` in one kernel."""
    d_gate, d_up, product = _launch("mlp_back", 3, gate, up, g)
    return d_gate, d_up, product


def _launch(name: str, outputs: int, *sums: LowRankSum) -> list[mx.array]:
    rows, width = sums[0].base.shape
    steps, blocks = lora_add.warp_grid(rows, width)
    return launch(
        name,
        [array for each in sums for array in each],
        [((rows, width), DTYPE)] * outputs,
        [rows, steps, width, *map(lora_add.rank_tiles, sums)],
        blocks=blocks,
        threads=THREADS,
        MOST=lora_add.compiled_tiles(sums),
    )
