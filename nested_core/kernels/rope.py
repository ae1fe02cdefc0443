"""Rotary embeddings on CUDA with their angles read from a table, in place of MLX's own.

MLX computes a power, a sine and a cosine for every pair of every few heads, forwards and backwards.
The table is what the module itself makes of ones and zeros, so that any of mlx-lm's rotations that
pair an element with the one half a head further is had, with whatever factors are in it (Su et al.
2021, RoFormer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import Llama3RoPE, SuScaledRoPE, YarnRoPE

from nested_core import backend
from nested_core.backend import to_float
from nested_core.kernels.cuda.launch import DTYPE, THREADS, WIDTH, launch
from nested_core.kernels.cuda.self_check import disagreement, is_sound
from nested_core.kernels.patching import standing_in

ROTATIONS = (nn.RoPE, Llama3RoPE, SuScaledRoPE, YarnRoPE)
PROBE = 7  # positions

Turn = Callable[[mx.array, mx.array, bool], mx.array]


def plain_turn(x: mx.array, table: mx.array, back: bool) -> mx.array:
    """Heads (batch, length, heads, width) turned by the table's angles, or back, in float32."""
    low, high = mx.split(x.astype(mx.float32), 2, axis=-1)
    c, s = (each[:, None] for each in mx.split(table, 2, axis=-1))
    s = -s if back else s
    return mx.concatenate([low * c - high * s, low * s + high * c], axis=-1).astype(x.dtype)


def turn_on_cuda(x: mx.array, table: mx.array, back: bool) -> mx.array:
    """The same in one kernel, for bfloat16 and heads whose width is a multiple of 16."""
    batch, length, heads, width = x.shape
    return launch(
        "turn",
        [x, table],
        [(x.shape, x.dtype)],
        [batch * length, length, heads, width // 2, -1.0 if back else 1.0],
        blocks=(-(-x.size // (2 * WIDTH * THREADS)), 1),
        threads=THREADS,
    )[0]


def table_of(rope: Callable[[mx.array], mx.array], length: int, width: int) -> mx.array:
    """What a rotation makes of ones and zeros: cosines and sines (length, width), float32."""
    halves = [mx.ones((1, 1, length, width // 2)), mx.zeros((1, 1, length, width // 2))]
    table = rope(mx.concatenate(halves, axis=-1))[0, 0]
    mx.eval(table)
    return table


class Angles:
    """The table of one rotation for as many positions as were asked for, a power of two of them."""

    def __init__(self, rope: Callable[[mx.array], mx.array], width: int) -> None:
        self._rope, self._width = rope, width
        self._table = table_of(rope, PROBE, width)

    def key(self) -> bytes:
        """The same for rotations that turn alike, as those of a model's layers do."""
        return np.array(self._table[:PROBE]).tobytes()

    def upto(self, length: int) -> mx.array:
        """Cosines and sines (length, width)."""
        if length > len(self._table):
            self._table = table_of(self._rope, 2 ** (length - 1).bit_length(), self._width)
        return self._table[:length]


def turned_by(module: nn.Module, turn: Turn, known: dict[bytes, Angles]) -> Callable[..., mx.array]:
    """A call in the place of a rotation's own: (batch, heads, length, width), from position 0.

    `known` are the tables of rotations so far, which are shared.
    """
    own, width = type(module).__call__, width_of(module)
    angles = Angles(lambda x: own(module, x), width)
    angles = known.setdefault(angles.key(), angles)

    @mx.custom_function
    def rotate(x: mx.array) -> Any:
        return turn(x, angles.upto(x.shape[1]), False)

    @rotate.vjp
    def _(x: mx.array, cotangent: mx.array, output: mx.array) -> Any:
        return turn(cotangent, angles.upto(x.shape[1]), True)

    def call(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Heads turned by the table where the kernel takes them, else by the module itself."""
        fits = x.ndim == 4 and x.shape[3] == width
        if args or kwargs or not fits or x.dtype != DTYPE:
            result: mx.array = own(module, x, *args, **kwargs)
            return result
        function: Any = rotate
        heads: mx.array = function(x.swapaxes(1, 2))  # as the projections gave them: no copy
        return heads.swapaxes(1, 2)

    return call


def width_of(module: Any) -> int:
    """The width of the heads that a rotation is made for, or 0."""
    return int(getattr(module, "dims", 0) or getattr(module, "dim", 0))


def is_halves(module: nn.Module) -> bool:
    """Whether a module is a rotation of pairs half a head apart, as the kernel computes it."""
    width = width_of(module)
    if not isinstance(module, ROTATIONS) or width % (2 * WIDTH):
        return False
    call: Any = module
    x = mx.random.normal((1, 3, PROBE, width), key=mx.random.key(0))
    expected, table = call(x), table_of(call, PROBE, width)
    found = plain_turn(x.swapaxes(1, 2), table, False).swapaxes(1, 2)
    return to_float(mx.abs(found - expected).max()) <= 1e-4 * to_float(mx.abs(expected).max())


@contextmanager
def tabled_rope(model: nn.Module) -> Iterator[None]:
    """Have a model's rotations computed by the kernel while the block runs."""
    with ExitStack() as stack:
        if backend.has_cuda() and _agrees_here():
            known: dict[bytes, Angles] = {}
            for _, module in model.named_modules():
                if is_halves(module):
                    call = turned_by(module, turn_on_cuda, known)
                    stack.enter_context(standing_in(module, call))
        yield


@cache
def _agrees_here() -> bool:
    return is_sound("rotary embeddings", trouble_with(turn_on_cuda))


def trouble_with(turn: Turn) -> str | None:
    """What is wrong with such a function, or None."""
    x = mx.random.normal((2, 5, 8, 48), key=mx.random.key(0)).astype(mx.bfloat16)
    table = table_of(nn.RoPE(48), 5, 48)
    ways = False, True
    return disagreement(
        lambda: [turn(x, table, back) for back in ways], [plain_turn(x, table, b) for b in ways]
    )
