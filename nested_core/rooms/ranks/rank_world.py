"""Data-parallel training: what the processes (ranks) of one run sum, agree on and compare.

All ranks start equal and stay equal to the bit, because each applies the same sum of gradients.
Where one rank no longer takes part, the others wait for it for ever, and no error comes. Each rank
sets an alarm of the system anew after each step. At SIGALRM faulthandler prints the stacks of the
process, which then ends (rank_worker.py registers that). So the alarm works in an endless loop,
in a call that never returns, and without a network.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core.errors import ConfigError, TrainingProcessesDiffer, go_on_with
from nested_core.optim.gradients import Flat
from nested_core.training.world import SummedGradients, Sums, Watch, World

LEAST_SECONDS = 60.0
TIMES_LONGEST_STEP = 10
REMEMBERED_STEPS = 20
# A step that compiles or follows an evaluation or a checkpoint may take so many times longer, and
# so may the next: what a step computed is waited for when the one after it is under way.
TIMES_LONGER = 10
LONG_STEPS = 2


def seconds_to_wait(timeout: float | str | None, longest: float) -> float:
    """Return the seconds of `training.hang_timeout`; else those that follow from the longest."""
    if timeout is None or isinstance(timeout, str):
        return max(LEAST_SECONDS, TIMES_LONGEST_STEP * longest)
    return timeout


class HangWatch(Watch):
    """Sets the alarm of this process; without a timeout it does nothing.

    Called at the same points of training in all ranks, so that all alarms go off together.
    """

    def __init__(self, timeout: float | str | None) -> None:
        """`timeout` is `training.hang_timeout`: seconds, `auto`, or None for no alarm."""
        self._timeout = timeout
        self._seconds: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._long_steps = 0
        self._last_step = time.monotonic()

    def after_step(self) -> None:
        """Note how long the step took, and allow the next one the time that follows from that."""
        now = time.monotonic()
        if self._long_steps > 0:
            self._long_steps -= 1
        else:
            self._seconds.append(now - self._last_step)
        self._last_step = now
        self._set_alarm()

    def allow_longer(self) -> None:
        """Allow more time until the next step: something else than steps is done before it."""
        self._long_steps = LONG_STEPS
        self._set_alarm()

    def end(self) -> None:
        """Turn the alarm off."""
        if self._timeout is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def seconds_allowed(self) -> float:
        """Return the time until the next step has to be done."""
        seconds = seconds_to_wait(self._timeout, max(self._seconds, default=0.0))
        return seconds * (TIMES_LONGER if self._long_steps > 0 else 1)

    def _set_alarm(self) -> None:
        if self._timeout is not None:
            signal.setitimer(signal.ITIMER_REAL, self.seconds_allowed())


# 2**32 over the golden ratio, so that neighbours' seeds lie far apart.
RANK_SEED_STRIDE = 0x9E3779B9


@dataclass(eq=False)
class RankWorld(World):
    """Several ranks of `group`, whose gradients are summed once a step."""

    group: mx.distributed.Group | None = None
    _request_counts: mx.array | None = field(default=None, init=False)  # of the step before

    def seed_of_step(self, seed: int, step: int) -> int:
        """Return a step's seed: each rank has its own, and rank 0 the one of a single process."""
        return super().seed_of_step(seed ^ (self.rank * RANK_SEED_STRIDE % 2**32), step)

    def sum_vector_over_ranks(self, vector: mx.array) -> mx.array:
        """Return the sum of all ranks' vectors. It can be traced; every rank has to call it."""
        summed: mx.array = mx.distributed.all_sum(vector, group=self.group)
        return summed

    def sum_gradients(
        self, gradients: Flat, weight: mx.array, requests: mx.array | None
    ) -> SummedGradients:
        """Sum the gradients, their weight and the requests of all ranks as one vector."""
        if requests is None:
            raise ValueError("several ranks send requests with every step")
        packed = pack_gradients_for_sum(gradients, weight, requests)
        summed = self.sum_vector_over_ranks(packed)
        return SummedGradients(*unpack_summed_gradients(summed, gradients), packed.nbytes)

    def sum_scalars_over_ranks(self, sums: Sums) -> Sums:
        """Sum scalars over the ranks; this waits for all of them."""
        totals = {name: mx.distributed.all_sum(v, group=self.group) for name, v in sums.items()}
        mx.eval(totals)
        return totals

    def gather_row_sums(self, rows: Sequence[mx.array]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the sums of all ranks' rows, in the order of the rows that all draw alike."""
        places = [np.arange(len(batch)) * self.size + self.rank for batch in rows]
        starts = np.cumsum([0, *(len(batch) * self.size for batch in rows)])
        everywhere = np.zeros(int(starts[-1]), np.float32)
        where = [start + place for start, place in zip(starts[:-1], places, strict=True)]
        everywhere[np.concatenate(where)] = super().gather_row_sums(rows)
        return np.array(self.sum_vector_over_ranks(mx.array(everywhere)), np.float64)

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; this waits for all of them."""
        return bool(mx.distributed.all_sum(mx.array(int(flag)), group=self.group).item())

    def require_equal_on_ranks(self, arrays: Mapping[str, mx.array], step: int) -> None:
        """Raise TrainingProcessesDiffer, naming ranks and arrays, if a bit differs among ranks."""
        of_this_rank = mx.stack([checksum(array) for array in arrays.values()])
        checksums = np.array(mx.distributed.all_gather(of_this_rank[None], group=self.group))
        # What most ranks have; of two that are as common, the lower rank's
        common = checksums[int(np.argmax([(checksums == row).all(1).sum() for row in checksums]))]
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

    def requests_to_send(self, read_requests: Callable[[], tuple[bool, bool]]) -> mx.array | None:
        """Tell whether this rank is to stop and to save, sent with the gradients of a step."""
        return mx.array(read_requests())

    def requests_after_step(
        self, counts: mx.array | None, read_requests: Callable[[], tuple[bool, bool]]
    ) -> tuple[bool, bool]:
        """Return whether any rank was asked to stop, and whether to save, at the step before.

        counts: of this step: how many ranks were asked to stop, and to save; None without them.
            They are read after the next step has begun, so that no rank waits for the device.
        read_requests: not used by ranks.
        """
        earlier, self._request_counts = self._request_counts, counts
        if earlier is None:
            return False, False
        must_stop, must_save = (np.array(earlier) > 0).tolist()
        if must_save:  # the step under way asks for it once more; a stop is asked for at every step
            self._request_counts = None
        return must_stop, must_save


def checksum(array: mx.array) -> mx.array:
    """Return a uint32 that any change of one element changes: bits times odd numbers, summed."""
    flat = array.reshape(-1)
    width = {1: mx.uint8, 2: mx.uint16}.get(array.dtype.size, mx.uint32)
    bits = mx.view(flat, width).astype(mx.uint32)
    return (bits * (mx.arange(bits.size, dtype=mx.uint32) * 2 + 1)).sum()


def join_ranks(expected: int, watch: HangWatch | None = None) -> RankWorld:
    """Join the ranks that `mlx.launch` started; ConfigError if they are not as many as expected."""
    watch = watch or HangWatch(None)
    backend = "nccl" if mx.cuda.is_available() else "any"
    watch.allow_longer()
    group = mx.distributed.init(strict=True, backend=backend)
    watch.end()
    if group.size() != expected:
        raise ConfigError(
            f"training.processes or hostfile asks for {expected} ranks, and mlx.launch started "
            f"{group.size()}."
        )
    return RankWorld(group.size(), group.rank(), watch, group)


def pack_gradients_for_sum(gradients: Flat, weight: mx.array, requests: mx.array) -> mx.array:
    """Pack a step's gradients in one float32 vector, then their weight and the requests."""
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
