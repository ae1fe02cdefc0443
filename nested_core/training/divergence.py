"""Watches for gradients that are not finite: logs every skipped step, gives up after too many.

One step is in flight while the counter of the one before is read, so that reading it is free.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import mlx.core as mx

from nested_core.backend import to_int
from nested_core.errors import TrainingDiverged

logger = logging.getLogger(__name__)


class DivergenceWatch:
    """Raises TrainingDiverged once `limit` steps in a row were skipped."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_flight: list[tuple[int, mx.array]] = []

    def add(self, step: int, counters: Mapping[str, mx.array]) -> None:
        """Note how many steps in a row were skipped; look at what the steps before noted."""
        self._in_flight.append((step, counters["nonfinite_in_a_row"]))
        self._look(keep=1)

    def settle(self) -> None:
        """Look at all that was noted, the last step included; this waits for the device."""
        self._look(keep=0)

    def _look(self, *, keep: int) -> None:
        while len(self._in_flight) > keep:
            step, counter = self._in_flight.pop(0)
            row = to_int(counter)
            if row > 0:
                logger.warning(
                    "step %d was skipped: its gradients are not finite (%d in a row)", step, row
                )
            if row >= self._limit:
                raise TrainingDiverged(_describe(row, step))


def _describe(row: int, step: int) -> str:
    """What to look at: no update can be to blame where there has been none."""
    if row == step:
        return (
            f"The gradients were not finite in any of the first {row} steps, so nothing was "
            f"trained: what the base model computes is not finite. Look for NaN and infinity in "
            f"its weights, or for a damaged download; training.precision: float32 rules out "
            f"numbers that are too large for a narrower type."
        )
    return (
        f"The gradients were not finite for {row} steps in a row, up to step {step}: training has "
        f"diverged. Lower learning_rate, set training.max_grad_norm, or look at the data of these "
        f"steps."
    )
