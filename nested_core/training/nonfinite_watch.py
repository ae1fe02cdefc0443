"""Steps whose gradients are not finite: each is logged, and too many in a row end training.

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
    """Logs every step that was skipped for gradients that are not finite; gives up after `limit`.

    The counter of a step is read when the next one is under way, so that reading it waits for
    nothing.
    """

    def __init__(self, limit: int, learning_rate: float) -> None:
        """Make a watch; `learning_rate` is the configured one, which the message names."""
        self._limit = limit
        self._learning_rate = learning_rate
        self._unread: list[tuple[int, mx.array]] = []

    def add_step(self, step: int, counters: Mapping[str, mx.array]) -> None:
        """Keep a step's counter of skipped steps in a row, and read those of the steps before.

        Raises TrainingDiverged once `limit` steps in a row were skipped.
        """
        self._unread.append((step, counters["nonfinite_in_a_row"]))
        self._read_counters_except_last(count=1)

    def finish(self) -> None:
        """Read every counter, the last step's included; this waits for the device."""
        self._read_counters_except_last(count=0)

    def _read_counters_except_last(self, *, count: int) -> None:
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
    """The message of TrainingDiverged; before the first update, no update can be to blame."""
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
