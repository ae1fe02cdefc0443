"""Log steps whose gradients are not finite, and end training after too many in a row.

It is a file of its own because benchmarks use it where pydantic is not installed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import mlx.core as mx

from nested_core.backend import to_int
from nested_core.errors import TrainingDiverged

logger = logging.getLogger(__name__)


class NonfiniteStepWatch:
    """Logs each step that was skipped for non-finite gradients; gives up after `limit` in a row.

    A step's counter is read when the next step is under way, so that reading it does not wait for
    the device.
    """

    def __init__(self, limit: int, learning_rate: float) -> None:
        """Create a watch; `learning_rate` is the configured rate, for the error message."""
        self._limit = limit
        self._learning_rate = learning_rate
        self._unread: list[tuple[int, mx.array]] = []

    def add_step(self, step: int, counters: Mapping[str, mx.array]) -> None:
        """Store a step's counter of steps skipped in a row, and read the counters of earlier steps.

        Raises TrainingDiverged once `limit` steps in a row were skipped.
        """
        self._unread.append((step, counters["nonfinite_in_a_row"]))
        self._read_counters_except_last(count=1)

    def finish(self) -> None:
        """Read all remaining counters, including the last step's; this waits for the device."""
        self._read_counters_except_last(count=0)

    def _read_counters_except_last(self, *, count: int) -> None:
        """Read all counters but the last `count`; log skipped steps, and raise at the limit."""
        while len(self._unread) > count:
            step, counter = self._unread.pop(0)
            skipped = to_int(counter)
            if skipped > 0:
                logger.warning(
                    "step %d was skipped: its gradients are not finite (%d in a row)", step, skipped
                )
            if skipped >= self._limit:
                raise TrainingDiverged(_describe_divergence(skipped, step, self._learning_rate))


def _describe_divergence(skipped: int, step: int, learning_rate: float) -> str:
    """Return the message of TrainingDiverged for `skipped` steps in a row up to `step`.

    If no step was ever applied, the base model is to blame and not the learning rate.
    """
    if skipped == step:
        return (
            f"The gradients were not finite in any of the first {skipped} steps, so nothing was "
            f"trained: what the base model computes is not finite. Look for NaN and infinity in "
            f"its weights, or for a damaged download; training.precision: float32 rules out "
            f"numbers that are too large for a narrower type."
        )
    return (
        f"The gradients were not finite for {skipped} steps in a row, up to step {step}: training "
        f"has diverged at learning_rate {learning_rate:g}. Lower it, set training.max_grad_norm, "
        f"or look at the data of these steps."
    )
