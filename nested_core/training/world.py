"""The processes that train one adapter together: in the core this process alone.

A room that trains in several gives the trainer a World of its own, with a sum, a comparison or a
wait where this one has nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from nested_core.optim.gradients import Flat
from nested_core.training.loss.loss_interface import MicroBatch

Sums = dict[str, mx.array]


class SummedGradients(NamedTuple):
    """A step's gradients, summed over the processes.

    gradients: by packed parameter, in the dtypes of the step.
    weight: what their sum is divided by.
    requests: float32, by how many processes each request was made; None in a single process.
    sent_bytes: the bytes that this process sent to the others.
    """

    gradients: Flat
    weight: mx.array
    requests: mx.array | None
    sent_bytes: int


@dataclass(eq=False)
class World:
    """How many processes train together, and which of them this one is: `rank`, from 0 on."""

    size: int = 1
    rank: int = 0

    @property
    def is_single_process(self) -> bool:
        """Whether this process trains alone."""
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes to the run directory."""
        return self.rank == 0

    # The data of a process
    def own_rows(self, batch: MicroBatch) -> MicroBatch:
        """The rows of a batch that this process computes."""
        return batch

    def seed_of_step(self, seed: int, step: int) -> int:
        """The seed of what a step draws at random."""
        return seed * 2**32 + step

    # What all processes know
    def sum_gradients(
        self, gradients: Flat, weight: mx.array, requests: mx.array | None
    ) -> SummedGradients:
        """The gradients of all processes. It is traced as a part of the step."""
        return SummedGradients(gradients, weight, requests, 0)

    def sum_scalars_over_ranks(self, sums: Sums) -> Sums:
        """Scalars, summed over the processes."""
        return sums

    def gather_row_sums(self, rows: Sequence[mx.array]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The summed loss of each row of an evaluation's batches, in the order of the rows."""
        return np.concatenate([np.array(batch, np.float64) for batch in rows])

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag

    def require_equal_on_ranks(self, arrays: Mapping[str, mx.array], step: int) -> None:
        """Raise TrainingProcessesDiffer if a bit differs among the processes."""

    # Requests to stop and to save, which all processes follow after the same step
    def requests_to_send(self, read_requests: Callable[[], tuple[bool, bool]]) -> mx.array | None:
        """What the step that begins tells the other processes: stop, and save."""
        return None

    def requests_after_step(
        self, counts: mx.array | None, read_requests: Callable[[], tuple[bool, bool]]
    ) -> tuple[bool, bool]:
        """Whether to stop and whether to save after a step; `counts` is what the step summed."""
        return read_requests()

    # How long a process may wait for the others
    def allow_longer(self) -> None:
        """Something else than steps is done before the next one."""

    def after_step(self) -> None:
        """A step was taken."""

    def end_watch(self) -> None:
        """Training is over: no process waits for another any more."""


SINGLE_PROCESS_WORLD = World()
