"""Early stopping: count evaluations in a row without improvement."""

from __future__ import annotations

import math

from nested_core.training.training_state import TrainingState


def count_evaluations_without_improvement(
    state: TrainingState, val_loss: float, *, min_delta: float
) -> None:
    """Update the state's count after an evaluation.

    A loss below the lowest so far by more than `min_delta` resets the count. A loss that is not
    finite is no improvement.
    """
    lowest = math.inf if state.lowest_val_loss is None else state.lowest_val_loss
    if val_loss < lowest - min_delta:
        state.lowest_val_loss = val_loss
        state.evaluations_without_improvement = 0
    else:
        state.evaluations_without_improvement += 1


def is_out_of_patience(state: TrainingState, patience: int | None) -> bool:
    """Whether `patience` evaluations in a row brought no improvement; None never stops."""
    return patience is not None and state.evaluations_without_improvement >= patience
