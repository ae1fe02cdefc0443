"""The gated MLP between its base layers' products, with what low-rank layers add: silu(gate) up.

On CUDA it is one pass over gate and up forwards, and one backwards, which makes the product again
for the gradient of the layer that reads it, so that it need not be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import mlx.core as mx

from nested_core.kernels.cuda.launch import DTYPE, THREADS, launch
from nested_core.kernels.cuda.lora_add import LowRankSum, example, grid_for, tiles_of
from nested_core.kernels.cuda.self_check import disagreement, is_sound
from nested_core.kernels.cuda.tiles import TILE

Three = tuple[mx.array, mx.array, mx.array]
Forward = Callable[[LowRankSum, LowRankSum], mx.array]
Backward = Callable[[LowRankSum, LowRankSum, LowRankSum], Three]


def gated(gate: LowRankSum, up: LowRankSum) -> mx.array:
    """silu(gate) up, in the dtype of gate's base, for factors that are for the kernels."""
    forward = forward_on_cuda if _are_alike(gate, up) else plain_forward
    return forward(gate, up)


def gated_back(gate: LowRankSum, up: LowRankSum, g: LowRankSum) -> Three:
    """The gradients with respect to gate and up, and silu(gate) up again; g is its gradient."""
    backward = backward_on_cuda if _are_alike(gate, up, g) else plain_backward
    return backward(gate, up, g)


def _are_alike(*sums: LowRankSum) -> bool:
    return all(each.base.dtype == DTYPE for each in sums)


def plain_forward(gate: LowRankSum, up: LowRankSum) -> mx.array:
    """`gated` in MLX's operations."""
    a, b = gate.plain(), up.plain()
    return (a * mx.sigmoid(a) * b).astype(gate.base.dtype)


def plain_backward(gate: LowRankSum, up: LowRankSum, g: LowRankSum) -> Three:
    """`gated_back` in MLX's operations."""
    a, b, c = gate.plain(), up.plain(), g.plain()
    s = mx.sigmoid(a)
    d_gate, d_up, output = c * b * (s + a * s * (1 - s)), c * a * s, a * s * b
    dtype = gate.base.dtype
    return d_gate.astype(dtype), d_up.astype(dtype), output.astype(dtype)


def forward_on_cuda(gate: LowRankSum, up: LowRankSum) -> mx.array:
    """`gated` in one kernel."""
    return _launch("mlp", 1, gate, up)[0]


def backward_on_cuda(gate: LowRankSum, up: LowRankSum, g: LowRankSum) -> Three:
    """`gated_back` in one kernel."""
    d_gate, d_up, output = _launch("mlp_back", 3, gate, up, g)
    return d_gate, d_up, output


def _launch(name: str, outputs: int, *sums: LowRankSum) -> list[mx.array]:
    rows, width = sums[0].base.shape
    (steps, blocks), (tiles, most) = grid_for(rows, width), tiles_of(sums)
    return launch(
        name,
        [array for each in sums for array in each],
        [((rows, width), DTYPE)] * outputs,
        [rows, steps, width, *tiles],
        blocks=blocks,
        threads=THREADS,
        MOST=most,
    )


@cache
def kernels_agree(most: int) -> bool:
    """Whether the kernels for so many tiles give what MLX does; a warning where they do not."""
    return is_sound("gated MLPs", trouble_with(forward_on_cuda, backward_on_cuda, most))


def trouble_with(forward: Forward, backward: Backward, most: int = 3) -> str | None:
    """What is wrong with such passes, or None; warps take rows more than once."""
    gate, up, g = (example(rank, 4128) for rank in (TILE * most, TILE, TILE))
    return disagreement(
        lambda: [forward(gate, up), *backward(gate, up, g)],
        [plain_forward(gate, up), *plain_backward(gate, up, g)],
    )
