"""The processes that train one adapter together: what they add up, agree on and compare.

A rank is one of them. They start equal and stay equal to the bit, for what one of them applies is
the same sum that all apply. A world of one adds nothing to a computation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from nested_core.errors import ConfigError, RanksDiffer
from nested_core.optim.gradients import Flat
from nested_core.training.loss.supervised import MicroBatch

Sums = dict[str, mx.array]
SPREAD = 0x9E3779B9  # 2**32 over the golden ratio: far apart for ranks that are next to each other


@dataclass(frozen=True)
class World:
    """All ranks, as one of them sees them; `group` is None where it is alone."""

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
        """This rank's rows of a batch that all ranks draw alike, every `size`-th of them."""
        return batch[0][self.rank :: self.size], batch[1][self.rank :: self.size]

    def seed(self, seed: int, step: int) -> int:
        """What a step's random state is seeded with: dropout differs from rank to rank."""
        return (seed ^ (self.rank * SPREAD % 2**32)) * 2**32 + step

    def sum_packed(self, packed: mx.array) -> mx.array:
        """The sum of all ranks' vectors; it can be traced, and every rank has to call it."""
        summed: mx.array = mx.distributed.all_sum(packed, group=self.group)
        return summed

    def total(self, sums: Sums) -> Sums:
        """Scalars summed over the ranks, now."""
        if self.is_single_process:
            return sums
        found = {name: mx.distributed.all_sum(v, group=self.group) for name, v in sums.items()}
        mx.eval(found)
        return found

    def any(self, asked: bool) -> bool:
        """Whether one rank or more says so; waits for all of them."""
        if self.is_single_process:
            return asked
        return bool(mx.distributed.all_sum(mx.array(int(asked)), group=self.group).item())

    def require_equal(self, held: Mapping[str, mx.array], step: int) -> None:
        """Raise RanksDiffer, naming ranks and arrays, where a bit differs from rank to rank."""
        if self.is_single_process:
            return
        own = mx.stack([checksum(array) for array in held.values()])
        rows = np.array(mx.distributed.all_gather(own[None], group=self.group))
        common = _most_common(rows)
        odd = [rank for rank, row in enumerate(rows) if (row != common).any()]
        if odd:
            names = [name for name, d in zip(held, (rows != common).any(0), strict=True) if d]
            raise RanksDiffer(
                f"At step {step} rank {', '.join(map(str, odd))} of {self.size} holds other "
                f"numbers than the rest, in {len(names)} of {len(held)} arrays, {names[0]} among "
                f"them. Ranks must be equal to the bit. Nothing of this step was kept: go on from "
                f"the last checkpoint with --resume, and look at that rank's machine: its MLX, its "
                f"device, and whether it reads the same model, data and run directory."
            )


SINGLE_PROCESS = World()


def _most_common(rows: np.ndarray) -> np.ndarray:
    """The row that most ranks hold; of two that are as common, that of the lower rank."""
    counts = [(rows == row).all(1).sum() for row in rows]
    common: np.ndarray = rows[int(np.argmax(counts))]
    return common


def checksum(array: mx.array) -> mx.array:
    """A uint32 that any change of one element changes: bits times odd numbers, summed mod 2**32."""
    flat = array.reshape(-1)
    width = {1: mx.uint8, 2: mx.uint16}.get(array.dtype.size, mx.uint32)
    bits = mx.view(flat, width).astype(mx.uint32)
    return (bits * (mx.arange(bits.size, dtype=mx.uint32) * 2 + 1)).sum()


def join(expected: int) -> World:
    """This process's place among the ranks that `mlx.launch` started."""
    backend = "nccl" if mx.cuda.is_available() else "any"
    group = mx.distributed.init(strict=True, backend=backend)
    if group.size() != expected:
        raise ConfigError(
            f"training.processes or hostfile asks for {expected} ranks, and mlx.launch started "
            f"{group.size()}."
        )
    return World(group.size(), group.rank(), group)


def pack_sums(gradients: Flat, weight: mx.array, asks: mx.array) -> mx.array:
    """A step's gradients in one float32 vector, with what they weigh and a wish to stop."""
    parts = [gradient.astype(mx.float32).reshape(-1) for gradient in gradients.values()]
    ends = [value.astype(mx.float32).reshape(1) for value in (weight, asks)]
    return mx.concatenate([*parts, *ends])


def unpack_sums(packed: mx.array, gradients: Flat) -> tuple[Flat, mx.array, mx.array]:
    """Gradients shaped as those given, their weight, and how many ranks ask to stop."""
    found, start = {}, 0
    for name, gradient in gradients.items():
        end = start + gradient.size
        found[name] = packed[start:end].reshape(gradient.shape).astype(gradient.dtype)
        start = end
    return found, packed[start], packed[start + 1]


class StopVote:
    """Whether training stops: all ranks come to know it at the same step.

    A wish travels with the gradients of a step and is read when the next one is under way, so that
    nobody waits for the device. Alone, a wish counts at once.
    """

    def __init__(self, world: World, is_asked: Callable[[], bool]) -> None:
        self._world, self._is_asked = world, is_asked
        self._in_flight: mx.array | None = None

    def now(self) -> bool:
        """Whether a rank is asked to stop; waits for all of them."""
        return self._world.any(self._is_asked())

    def wish(self) -> bool:
        """What this rank says in the step that comes."""
        return not self._world.is_single_process and self._is_asked()

    def after(self, votes: mx.array | None) -> bool:
        """What follows from a step that was taken, or, among ranks, from the one before it."""
        if self._world.is_single_process:
            return self._is_asked()
        before, self._in_flight = self._in_flight, votes
        return before is not None and bool(before.item())
