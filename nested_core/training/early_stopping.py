"""Early stopping: count evaluations in a row without improvement."""

from __future__ import annotations

from nested_core.training.training_state import TrainingState


def count_evaluations_without_improvement(
    state: TrainingState, val_loss: float, *, min_delta: float, flushes: bool = False
) -> None:
    """Update the state's count after an evaluation that the state has recorded.

    Counted are only evaluations at which training could end with an adapter to offer: those of
    candidates, and after step 0 all if the end applies what slow tiers have accumulated
    (`flushes`). A better one resets the count, by what selects the step (`improves_on`).
    """
    if not (state.is_candidate or (flushes and state.step > 0)):
        return
    if state.improves_on(state.lowest_wrong, state.lowest_val_loss, min_delta=min_delta):
        state.lowest_val_loss = val_loss
        state.lowest_wrong = state.wrong
        state.evaluations_without_improvement = 0
    else:
        state.evaluations_without_improvement += 1


def is_out_of_patience(state: TrainingState, patience: int | None) -> bool:
    """Whether `patience` evaluations in a row brought no improvement; None never stops."""
    return patience is not None and state.evaluations_without_improvement >= patience
