"""The kernels of gated delta nets: triangular inverses, and states carried from chunk to chunk."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from nested_core.kernels.self_check import checked_kernel, random_arrays
from nested_core.rooms.cuda.kernel_launch import launch_kernel
from nested_core.rooms.delta_nets.gated_delta import CHUNK_SIZES, carry_in_mlx, invert_in_mlx

CARRIED_ROWS = 32, 64, 96, 128  # key widths of states that the kernel carries
CARRIED_COLUMNS = 32  # of a state, in one block of the kernel


def _example_matrices() -> list[tuple[mx.array]]:
    size = CHUNK_SIZES["gpu"]
    (a,) = random_arrays((37, size, size), dtype=mx.float32)
    return [(mx.where(mx.tri(size, k=-1, dtype=mx.bool_), 0.2 * a, 0),)]


@checked_kernel("triangular inverses", reference=invert_in_mlx, examples=_example_matrices)
def invert_on_cuda(a: mx.array) -> mx.array:
    """Run `invert_in_mlx` in one kernel, for float32 and up to 64 rows."""
    size = a.shape[-1]
    return launch_kernel(
        "unit_lower_inverse",
        [a],
        [(a.shape, a.dtype)],
        [],
        blocks=(a.size // size**2, 1),
        threads=size,
        dtypes=[mx.float32],
        SIZE=size,
    )[0]


def invert_unit_lower(a: mx.array) -> mx.array | None:
    """Run `invert_in_mlx` by the kernel; None if it does not fit."""
    fits = a.dtype == mx.float32 and a.shape[-1] == CHUNK_SIZES["gpu"]
    return invert_on_cuda(a) if fits and invert_on_cuda.is_usable() else None


def _example_chunks(size: int) -> list[tuple[Any, ...]]:
    e, r, gates = random_arrays((5, 3, size, size), (5, 3, size, 64), (5, 3, size, 1))
    decay = mx.sigmoid(gates.astype(mx.float32))
    state = mx.ones((3, size, 64))
    return [
        (each, e / size, r, state, direction)
        for each in (decay, decay[..., :1, :])
        for direction in (1, -1)
    ]


@checked_kernel("states of gated delta nets", reference=carry_in_mlx, examples=_example_chunks)
def carry_on_cuda(
    decay: mx.array, erased: mx.array, written: mx.array, state: mx.array, direction: int = 1
) -> list[mx.array]:
    """Run `carry_in_mlx` in one kernel, for bfloat16 chunks and a float32 state that fit."""
    size, width = state.shape[-2:]
    matrices = state.size // (size * width)
    return launch_kernel(
        "carry_state",
        [decay, erased, written, state],
        [(written.shape, written.dtype), (state.shape, state.dtype)],
        [len(written), matrices, width, int(decay.shape[-2] > 1), int(direction < 0)],
        blocks=(matrices * (width // CARRIED_COLUMNS), 1),
        threads=2 * size,
        dtypes=[mx.float32, mx.bfloat16, mx.bfloat16, mx.float32],
        SIZE=size,
    )


def carry_states(
    decay: mx.array, erased: mx.array, written: mx.array, state: mx.array, direction: int
) -> list[mx.array] | None:
    """Run `carry_in_mlx` by the kernel; None if it does not fit."""
    size, width = state.shape[-2:]
    dtypes = [each.dtype for each in (decay, erased, written, state)]
    fits = (
        dtypes == [mx.float32, mx.bfloat16, mx.bfloat16, mx.float32]
        and size in CARRIED_ROWS
        and width % CARRIED_COLUMNS == 0
    )
    if not fits or not carry_on_cuda.is_usable(size):
        return None
    carried: list[mx.array] = carry_on_cuda(decay, erased, written, state, direction)
    return carried
