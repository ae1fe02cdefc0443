"""Red flags while training runs: something that should have moved did not.

They are warnings, kept in the run's state; whether the run is worth anything the gate decides.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence

from nested_core.errors import SilentUpdateWarning
from nested_core.pytree import UpdateReport
from nested_core.training.state import TrainingState


def raise_flag(state: TrainingState, kind: str, message: str) -> None:
    """Warn once a run of each kind of trouble, and keep the message."""
    if not any(flag.startswith(f"{kind}:") for flag in state.red_flags):
        state.red_flags.append(f"{kind}: {message}")
        warnings.warn(f"{kind}: {message}", SilentUpdateWarning, stacklevel=3)


def flag_updates(state: TrainingState, report: UpdateReport, idle: Sequence[str]) -> None:
    """Flag updates that are not in the model, and due parameters that stayed as they were.

    `idle` are those that had no gradient yet (lora_a, while lora_b is still zero).
    """
    if report.not_applied:
        raise_flag(
            state,
            "updates_not_applied",
            f"at step {state.step} {len(report.not_applied)} of {report.checked} computed updates "
            f"are not in the model, {report.not_applied[0]} among them. It is not being trained.",
        )
    unmoved = [name for name in report.unmoved if name not in set(idle)]
    if unmoved and not report.not_applied:
        raise_flag(
            state,
            "parameters_unchanged",
            f"the update of step {state.step} left {len(unmoved)} of {report.checked} parameters "
            f"as they were, {unmoved[0]} among them: is the learning rate too small?",
        )


def flag_flat_loss(state: TrainingState, losses: Sequence[float], window: int) -> None:
    """Flag a training loss whose last `window` reports show no movement beyond their noise.

    The later half's mean has to differ from the earlier half's by more than two standard errors,
    or lie that far below the first report: a run that has converged is not a run that is stuck.
    """
    if len(losses) < window:
        return
    recent = list(losses[-window:])
    early, late = recent[: window // 2], recent[window // 2 :]
    spread = statistics.pstdev(recent)
    noise = 2 * spread * (1 / len(early) + 1 / len(late)) ** 0.5
    moving = abs(statistics.fmean(late) - statistics.fmean(early)) > noise
    has_learned = losses[0] - statistics.fmean(late) > max(2 * spread, 1e-6)
    if not moving and not has_learned:
        raise_flag(
            state,
            "loss_flat",
            f"the training loss has not moved beyond noise over {window} reports "
            f"({recent[0]:.4f} to {recent[-1]:.4f}).",
        )
