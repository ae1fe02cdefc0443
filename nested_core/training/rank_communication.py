"""Data-parallel training: what the processes (ranks) of one run sum, agree on and compare.

All ranks start equal and stay equal to the bit, because each applies the same sum of gradients. In
a single process nothing here adds to a computation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from nested_core.errors import ConfigError, TrainingProcessesDiffer, go_on_with
from nested_core.optim.gradients import Flat
from nested_core.training.loss.loss_interface import MicroBatch

Sums = dict[str, mx.array]
RANK_SEED_STRIDE = (
    0x9E3779B9  # 2**32 over the golden ratio, so that neighbours' seeds lie far apart
)


@dataclass(frozen=True)
class World:
    """The number of ranks, and which of them this process is; `group` is None in one process."""

    size: int = 1
    rank: int = 0
    group: mx.distributed.Group | None = None

    @property
    def is_single_process(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes to the run directory."""
        return self.rank == 0

    def own_rows(self, batch: MicroBatch) -> MicroBatch:
        """This rank's rows of a batch that all ranks draw alike: every `size`-th of them."""
        tokens, target_mask = batch
        return tokens[self.rank :: self.size], target_mask[self.rank :: self.size]

    def seed_of_step(self, seed: int, step: int) -> int:
        """A step's seed: each rank has its own, and rank 0 the one of a single process."""
        return (seed ^ (self.rank * RANK_SEED_STRIDE % 2**32)) * 2**32 + step

    def sum_vector_over_ranks(self, vector: mx.array) -> mx.array:
        """The sum of all ranks' vectors. It can be traced; every rank has to call it."""
        summed: mx.array = mx.distributed.all_sum(vector, group=self.group)
        return summed

    def sum_scalars_over_ranks(self, sums: Sums) -> Sums:
        """Scalars summed over the ranks; this waits for all of them."""
        if self.is_single_process:
            return sums
        totals = {name: mx.distributed.all_sum(v, group=self.group) for name, v in sums.items()}
        mx.eval(totals)
        return totals

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; this waits for all of them."""
        if self.is_single_process:
            return flag
        return bool(mx.distributed.all_sum(mx.array(int(flag)), group=self.group).item())

    def require_equal_on_ranks(self, arrays: Mapping[str, mx.array], step: int) -> None:
        """Raise TrainingProcessesDiffer, naming ranks and arrays, if a bit differs among ranks."""
        if self.is_single_process:
            return
        own = mx.stack([checksum(array) for array in arrays.values()])
        checksums = np.array(mx.distributed.all_gather(own[None], group=self.group))
        common = _most_common_row(checksums)
        odd_ranks = [rank for rank, row in enumerate(checksums) if (row != common).any()]
        if odd_ranks:
            differs = (checksums != common).any(0)
            names = [name for name, is_other in zip(arrays, differs, strict=True) if is_other]
            raise TrainingProcessesDiffer(
                f"At step {step} rank {', '.join(map(str, odd_ranks))} of {self.size} holds other "
                f"numbers than the rest, in {len(names)} of {len(arrays)} arrays, {names[0]} among "
                f"them. Ranks must be equal to the bit. Nothing of this step was kept. "
                f"Look at that rank's machine: its MLX, its device, and whether it reads the same "
                f"model, data and run directory.",
                advice=go_on_with(),
            )


SINGLE_PROCESS_WORLD = World()


def _most_common_row(rows: np.ndarray) -> np.ndarray:
    """The row that most ranks have; of two that are as common, the lower rank's."""
    counts = [(rows == row).all(1).sum() for row in rows]
    common: np.ndarray = rows[int(np.argmax(counts))]
    return common


def checksum(array: mx.array) -> mx.array:
    """A uint32 that any change of one element changes: bits times odd numbers, summed mod 2**32."""
    flat = array.reshape(-1)
    width = {1: mx.uint8, 2: mx.uint16}.get(array.dtype.size, mx.uint32)
    bits = mx.view(flat, width).astype(mx.uint32)
    return (bits * (mx.arange(bits.size, dtype=mx.uint32) * 2 + 1)).sum()


def join_ranks(expected: int) -> World:
    """Join the ranks that `mlx.launch` started; ConfigError if they are not as many as expected."""
    backend = "nccl" if mx.cuda.is_available() else "any"
    group = mx.distributed.init(strict=True, backend=backend)
    if group.size() != expected:
        raise ConfigError(
            f"training.processes or hostfile asks for {expected} ranks, and mlx.launch started "
            f"{group.size()}."
        )
    return World(group.size(), group.rank(), group)


def pack_gradients_for_sum(gradients: Flat, weight: mx.array, requests: mx.array) -> mx.array:
    """A step's gradients in one float32 vector, then their weight and this rank's requests."""
    values = (*gradients.values(), weight, requests)
    return mx.concatenate([value.astype(mx.float32).reshape(-1) for value in values])


def unpack_summed_gradients(packed: mx.array, gradients: Flat) -> tuple[Flat, mx.array, mx.array]:
    """Undo `pack_gradients_for_sum`: gradients in these shapes, their weight, request counts."""
    unpacked = {}
    start = 0
    for name, gradient in gradients.items():
        end = start + gradient.size
        unpacked[name] = packed[start:end].reshape(gradient.shape).astype(gradient.dtype)
        start = end
    return unpacked, packed[start], packed[start + 1 :]
