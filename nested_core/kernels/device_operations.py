"""The operations that our layers compute with: MLX's, or kernels that a room has for the device.

The functions that end in `in_mlx` are the formulas, which kernels are compared with
(self_check.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import mlx.nn as nn

from nested_core import backend, seams
from nested_core.kernels.call_tracing import CallTrace, GatedMLP

Pairs = Sequence[tuple[mx.array, mx.array]]
LayerContext = Callable[[nn.Module], AbstractContextManager[None]]

RANKS_PER_TILE = 8  # rows of a factor in one fragment of a matrix instruction
MAX_TILES = 8  # of a factor that a kernel is compiled for


def has_kernel_for_rank(rank: int) -> bool:
    """Return whether a rank fills whole tiles of a kernel, and not more than the maximum."""
    return 0 < rank <= RANKS_PER_TILE * MAX_TILES and rank % RANKS_PER_TILE == 0


def concatenate_in_mlx(arrays: Sequence[mx.array]) -> mx.array:
    """Concatenate the flattened arrays, of one dtype, into one vector."""
    vectors = [array.reshape(-1) for array in arrays]
    return vectors[0] if len(vectors) == 1 else mx.concatenate(vectors)


def project_to_rank_in_mlx(pairs: Pairs, scale: float) -> mx.array:
    """Return scale * m @ x.T of each pair (m, x), stacked to (sum of ranks, rows).

    m: (rank, width); x: (rows, width). Widths may differ between pairs.
    """
    products = [m @ x.T for m, x in pairs]
    return scale * (products[0] if len(products) == 1 else mx.concatenate(products))


def factor_gradients_in_mlx(pairs: Pairs) -> Sequence[mx.array]:
    """Return z @ x of each pair (z, x), where z is (rank, rows) and x (rows, width)."""
    return [z @ x for z, x in pairs]


class DeviceOperations:
    """The operations of our layers, in MLX's operations; a room's subclass has kernels for some."""

    # What changes how a model computes while it trains, beside the layers of the core
    layer_contexts: Sequence[LayerContext] = ()

    def concatenate_flattened(self, arrays: Sequence[mx.array]) -> mx.array:
        """Concatenate the flattened arrays, of one dtype, into one vector."""
        return concatenate_in_mlx(arrays)

    def project_to_rank(self, pairs: Pairs, scale: float) -> mx.array:
        """Return scale * m @ x.T of each pair (m, x), stacked to (sum of ranks, rows).

        m: (rank, width); x: (rows, width).
        """
        return project_to_rank_in_mlx(pairs, scale)

    def factor_gradients(self, pairs: Pairs) -> Sequence[mx.array]:
        """Return z @ x of each pair (z, x), where z is (rank, rows) and x (rows, width)."""
        return factor_gradients_in_mlx(pairs)

    def can_add_low_rank_products(self, x: mx.array, factors: Sequence[mx.array]) -> bool:
        """Return whether `add_low_rank_products` can take x and these (rank, width) factors."""
        return False

    def add_low_rank_products(
        self, bases: Sequence[mx.array], z: Sequence[mx.array], factors: Sequence[mx.array]
    ) -> Sequence[mx.array]:
        """Return each base + z.T @ factor.

        bases: (rows, width) each; z: (rank, rows) each; factors: (rank, width) each.
        """
        raise NotImplementedError

    def check_kernels(self, ranks: Collection[int]) -> None:
        """Compile and check the kernels for layers of these ranks, before a step is traced."""

    def invert_unit_lower(self, a: mx.array) -> mx.array | None:
        """Compute `gated_delta.invert_in_mlx` by a kernel; None if no kernel takes the array."""
        return None

    def carry_states(
        self, decay: mx.array, erased: mx.array, written: mx.array, state: mx.array, direction: int
    ) -> list[mx.array] | None:
        """Compute `gated_delta.carry_in_mlx` by a kernel; None if no kernel takes the arrays."""
        return None

    def find_expert_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """Return the layers with LoRA on experts that a context of `layer_contexts` computes."""
        return []

    def find_fusable_mlps(self, trace: CallTrace) -> list[GatedMLP]:
        """Return the gated MLPs that `using_fused_mlps` can compute."""
        return []

    def using_fused_mlps(self, mlps: Sequence[GatedMLP]) -> AbstractContextManager[None]:
        """Compute each of these MLPs as one fused function during the block."""
        return nullcontext()


MLX_OPERATIONS = DeviceOperations()


def device_operations() -> DeviceOperations:
    """Return the operations for the present device: the room cuda's kernels, or MLX's."""
    if not (backend.computes_on_cuda() and seams.is_there("cuda")):
        return MLX_OPERATIONS
    operations: DeviceOperations = seams.load_only("cuda_operations", "kernels")
    return operations
