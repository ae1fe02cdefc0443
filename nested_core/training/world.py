"""The processes that train one adapter together; in the core this is a single process.

The room ranks passes a subclass to the trainer, whose methods sum, compare or wait where those of
`World` have nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from nested_core.data.batches import BatchRows
from nested_core.optim.gradients import Flat

Sums = dict[str, mx.array]


class SummedGradients(NamedTuple):
    """A step's gradients, summed over the processes.

    gradients: by packed parameter, in the dtypes of the step.
    weight: the number to divide their sum by.
    requests: how many processes made each request, float32; None in a single process.
    sent_bytes: the bytes that this process sent to the others.
    """

    gradients: Flat
    weight: mx.array
    requests: mx.array | None
    sent_bytes: int


class Watch:
    """The time limit for waiting for other processes; a single process waits for none."""

    def allow_longer(self) -> None:
        """Allow more time before the next step, for work other than a step."""

    def after_step(self) -> None:
        """Note that a step was taken."""

    def end(self) -> None:
        """Stop watching for processes that no longer respond: training is over."""


@dataclass(eq=False)
class World:
    """The number of processes that train together, and the `rank` of this one, from 0.

    The methods here are those of a single process; a room overrides them.

    watch: ends this process where it waits for the others for too long.
    """

    size: int = 1
    rank: int = 0
    watch: Watch = field(default_factory=Watch)

    @property
    def is_single_process(self) -> bool:
        """Whether this process trains alone."""
        return self.size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes to the run directory."""
        return self.rank == 0

    # The data of a process
    def own_rows(self, batch: BatchRows) -> BatchRows:
        """Return the rows of a batch that this process computes: every `size`-th of them."""
        return BatchRows(batch.rows[self.rank :: self.size], batch.width)

    def seed_of_step(self, seed: int, step: int) -> int:
        """Return the seed for a step's random draws."""
        return seed * 2**32 + step

    # What all processes know
    def sum_gradients(
        self, gradients: Flat, weight: mx.array, requests: mx.array | None
    ) -> SummedGradients:
        """Return the gradients summed over all processes. It is traced as a part of the step."""
        return SummedGradients(gradients, weight, requests, 0)

    def sum_scalars_over_ranks(self, sums: Sums) -> Sums:
        """Return the scalars summed over the processes."""
        return sums

    def gather_row_sums(self, rows: Sequence[mx.array]) -> np.typing.NDArray[np.float64]:
        """Return the summed loss of each row of an evaluation's batches, in row order."""
        return np.concatenate([np.array(batch, np.float64) for batch in rows])

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return flag

    def require_equal_on_ranks(self, arrays: Mapping[str, mx.array], step: int) -> None:
        """Raise TrainingProcessesDiffer if the arrays differ between processes in any bit."""

    # Requests to stop and to save, which all processes must act on after the same step
    def requests_to_send(self, read_requests: Callable[[], tuple[bool, bool]]) -> mx.array | None:
        """Return this process's requests (stop, save) for the next step to sum; None if alone."""
        return None

    def requests_after_step(
        self, counts: mx.array | None, read_requests: Callable[[], tuple[bool, bool]]
    ) -> tuple[bool, bool]:
        """Return whether to stop and whether to save, given the request counts of the step."""
        return read_requests()


SINGLE_PROCESS_WORLD = World()
