"""What is computed by kernels that a room has for the device; here by MLX's operations.

The functions that end in `in_mlx` are the formulas, which kernels are compared with
(self_check.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import mlx.nn as nn

from nested_core import backend, seams

# What the room cuda's kernels take, which forecasts of memory ask on every device
RANKS_PER_TILE = 8  # rows of a factor in one fragment of a matrix instruction
MAX_TILES = 8  # of a factor that a kernel is compiled for
# Lengths that MLX's fused backward pass takes (ScaledDotProductAttentionVJP::use_fallback)
FUSED_LENGTH_MULTIPLE = 128


def has_kernel_for_rank(rank: int) -> bool:
    """Return whether a rank fills whole tiles of a kernel, and not more than the maximum."""
    return 0 < rank <= RANKS_PER_TILE * MAX_TILES and rank % RANKS_PER_TILE == 0


def concatenate_in_mlx(arrays: Sequence[mx.array]) -> mx.array:
    """Concatenate the flattened arrays, of one dtype, into one vector."""
    vectors = [array.reshape(-1) for array in arrays]
    return vectors[0] if len(vectors) == 1 else mx.concatenate(vectors)


class DeviceOperations:
    """mlx-lm's layers and MLX's operations; a room's subclass has its own for a device."""

    def using_layers(self, model: nn.Module) -> AbstractContextManager[None]:
        """Compute a model with the layers for the device during the block."""
        return nullcontext()

    def describe_layers(self, model: nn.Module) -> str:
        """Say in one line which of the model's layers are ours, and why others are not."""
        is_missing = backend.computes_on_cuda()
        why = "ours are not installed" if is_missing else "ours are for CUDA"
        return f"layers: mlx-lm's own; {why} (nested_core/rooms/cuda)"

    def concatenate_flattened(self, arrays: Sequence[mx.array]) -> mx.array:
        """Concatenate the flattened arrays, of one dtype, into one vector."""
        return concatenate_in_mlx(arrays)

    def invert_unit_lower(self, a: mx.array) -> mx.array | None:
        """Compute `gated_delta.invert_in_mlx` by a kernel; None if no kernel takes the array."""
        return None

    def carry_states(
        self, decay: mx.array, erased: mx.array, written: mx.array, state: mx.array, direction: int
    ) -> list[mx.array] | None:
        """Compute `gated_delta.carry_in_mlx` by a kernel; None if no kernel takes the arrays."""
        return None


MLX_OPERATIONS = DeviceOperations()


def device_operations() -> DeviceOperations:
    """Return the operations for the present device: the room cuda's kernels, or MLX's."""
    if not (backend.computes_on_cuda() and seams.is_there("cuda")):
        return MLX_OPERATIONS
    return seams.load_only(DeviceOperations, "kernels")
