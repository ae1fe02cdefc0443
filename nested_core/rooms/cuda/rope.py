"""Rotary embeddings on CUDA with their cosines and sines read from a table, in place of MLX's own.

MLX computes a power, a sine and a cosine for every pair of every few heads, forwards and backwards.
The table is what the module itself makes of ones and zeros. So it holds for each of mlx-lm's
rotations that pairs an element with the one half a head further, whatever factors are in it (Su et
al. 2021, RoFormer).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import Llama3RoPE, SuScaledRoPE, YarnRoPE

from nested_core.backend import to_float
from nested_core.kernels.patching import replacing_calls
from nested_core.kernels.self_check import checked_kernel
from nested_core.rooms.cuda.kernel_launch import (
    ELEMENTS_PER_LOAD,
    KERNEL_DTYPE,
    MAX_THREADS_PER_BLOCK,
    launch_kernel,
)

ROPE_CLASSES = (nn.RoPE, Llama3RoPE, SuScaledRoPE, YarnRoPE)
PROBE_LENGTH = 7  # positions

Rotate = Callable[[mx.array, mx.array, bool], mx.array]


def rotate_in_mlx(x: mx.array, table: mx.array, inverse: bool) -> mx.array:
    """Rotate heads (batch, length, heads, width) by the table's angles, or back, in float32."""
    low, high = mx.split(x.astype(mx.float32), 2, axis=-1)
    c, s = (half[:, None] for half in mx.split(table, 2, axis=-1))
    s = -s if inverse else s
    return mx.concatenate([low * c - high * s, low * s + high * c], axis=-1).astype(x.dtype)


def _example_inputs() -> list[tuple[mx.array, mx.array, bool]]:
    x = mx.random.normal((2, 5, 8, 48), key=mx.random.key(0)).astype(mx.bfloat16)
    table = make_rotation_table(nn.RoPE(48), 5, 48)
    return [(x, table, False), (x, table, True)]


@checked_kernel("rotary embeddings", reference=rotate_in_mlx, examples=_example_inputs)
def rotate_on_cuda(x: mx.array, table: mx.array, inverse: bool) -> mx.array:
    """Return the same in one kernel, for bfloat16 and heads whose width is a multiple of 16."""
    batch, length, heads, width = x.shape
    return launch_kernel(
        "rotate",
        [x, table],
        [(x.shape, x.dtype)],
        [batch * length, length, heads, width // 2, -1.0 if inverse else 1.0],
        blocks=(-(-x.size // (2 * ELEMENTS_PER_LOAD * MAX_THREADS_PER_BLOCK)), 1),
        dtypes=[KERNEL_DTYPE, mx.float32],
    )[0]


def make_rotation_table(rope: Callable[[mx.array], mx.array], length: int, width: int) -> mx.array:
    """Rotate ones and zeros to read cosines and sines (length, width), float32."""
    halves = [mx.ones((1, 1, length, width // 2)), mx.zeros((1, 1, length, width // 2))]
    table = rope(mx.concatenate(halves, axis=-1))[0, 0]
    mx.eval(table)
    return table


class RotationTable:
    """The table of one rotation, for the most positions asked for so far: a power of two."""

    def __init__(self, rope: Callable[[mx.array], mx.array], width: int) -> None:
        self._rope = rope
        self._width = width
        self._table = make_rotation_table(rope, PROBE_LENGTH, width)

    def angles_key(self) -> bytes:
        """Return bytes that are equal for rotations by equal angles, as in a model's layers."""
        return np.array(self._table[:PROBE_LENGTH]).tobytes()

    def cosines_and_sines(self, length: int) -> mx.array:
        """Return cosines and sines of the first positions (length, width)."""
        if length > len(self._table):
            longer = 2 ** (length - 1).bit_length()
            self._table = make_rotation_table(self._rope, longer, self._width)
        return self._table[:length]


def make_rotation_call(
    module: nn.Module, rotate: Rotate, tables: dict[bytes, RotationTable]
) -> Callable[..., mx.array]:
    """Return a call in place of a rotation's own: (batch, heads, length, width), from position 0.

    `tables` are those of the rotations before, by their keys: equal rotations share one.
    """
    own: Callable[..., mx.array] = type(module).__call__
    width = rope_head_width(module)
    table = RotationTable(lambda x: own(module, x), width)
    table = tables.setdefault(table.angles_key(), table)

    @mx.custom_function
    def rotation(x: mx.array) -> Any:
        return rotate(x, table.cosines_and_sines(x.shape[1]), False)

    @rotation.vjp
    def _(x: mx.array, cotangent: mx.array, output: mx.array) -> Any:
        return rotate(cotangent.astype(x.dtype), table.cosines_and_sines(x.shape[1]), True)

    def call(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Rotate heads by the table if they fit the kernel, else by the module itself."""
        fits = x.ndim == 4 and x.shape[3] == width and x.dtype == KERNEL_DTYPE
        if args or kwargs or not fits:
            return own(module, x, *args, **kwargs)
        heads = cast(mx.array, rotation(x.swapaxes(1, 2)))  # as projections gave them: no copy
        return heads.swapaxes(1, 2)

    return call


def rope_head_width(module: Any) -> int:
    """Return the width of the heads that a rotation is made for, or 0."""
    return int(getattr(module, "dims", 0) or getattr(module, "dim", 0))


def rotates_halves(module: nn.Module) -> bool:
    """Tell if a module rotates pairs half a head apart, as the kernel computes it."""
    width = rope_head_width(module)
    if not isinstance(module, ROPE_CLASSES) or width % (2 * ELEMENTS_PER_LOAD):
        return False
    rope: Any = module
    x = mx.random.normal((1, 3, PROBE_LENGTH, width), key=mx.random.key(0))
    expected, table = rope(x), make_rotation_table(rope, PROBE_LENGTH, width)
    rotated = rotate_in_mlx(x.swapaxes(1, 2), table, False).swapaxes(1, 2)
    return to_float(mx.abs(rotated - expected).max()) <= 1e-4 * to_float(mx.abs(expected).max())


def using_rope_tables(model: nn.Module) -> AbstractContextManager[None]:
    """Have a model's rotations computed by the kernel while the block runs."""
    modules = model.named_modules() if rotate_on_cuda.is_usable() else ()
    tables: dict[bytes, RotationTable] = {}
    return replacing_calls(
        (module, make_rotation_call(module, rotate_on_cuda, tables))
        for _, module in modules
        if rotates_halves(module)
    )
