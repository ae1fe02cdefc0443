"""Red flags while training runs: something that should have moved did not.

They are warnings, kept in the run's state; whether the run is worth anything the gate decides.
"""

from __future__ import annotations

import filecmp
import math
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from nested_core.backend import to_float, to_int
from nested_core.errors import SilentUpdateWarning
from nested_core.optim.clock import COUNTERS
from nested_core.optim.gradients import gradient_evidence
from nested_core.optim.pytree import UpdateReport, flatten
from nested_core.optim.tiered import Tiered
from nested_core.optim.tiers import TierMap
from nested_core.storage.adapter import WEIGHTS_NAME
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


def idle_names(optimizer: Tiered, tiers: TierMap, step: int, names: Sequence[str]) -> list[str]:
    """Those that could not have moved: not due, no rate, a skipped step, or no gradient yet."""
    if not names:
        return []
    was_skipped = to_int(optimizer.state[COUNTERS]["nonfinite_in_a_row"]) > 0
    has_rate = to_float(optimizer.learning_rate) > 0.0
    if was_skipped or not has_rate:
        return list(names)
    state, due = flatten(optimizer.state), tiers.due(step)
    evidence = {name: gradient_evidence(state, name) for name in names}
    return [
        name
        for name, array in evidence.items()
        if tiers.tensors[name] not in due or array is None or not bool(mx.any(array).item())
    ]


def flag_unchanged_checkpoint(state: TrainingState, checkpoint: Path, initial: Path) -> None:
    """Flag a checkpoint whose adapter file is that of the initial adapter, byte for byte.

    Both are written by `adapters.save_arrays`, which gives equal arrays equal bytes. Not asked of
    a step before every tier was due, or of the first, whose rate a warm-up may have at 0.
    """
    if filecmp.cmp(checkpoint / WEIGHTS_NAME, initial / WEIGHTS_NAME, shallow=False):
        raise_flag(
            state,
            "checkpoint_unchanged",
            f"the checkpoint of step {state.step} equals the initial adapter, byte for byte: "
            f"nothing has been trained yet.",
        )


def flag_flat_loss(state: TrainingState, losses: Sequence[float], window: int) -> None:
    """Flag a training loss whose last `window` reports show no movement beyond their noise.

    The later half's mean has to differ from the earlier half's by more than two standard errors,
    or lie that far below the first report: a run that has converged is not a run that is stuck.
    Reports whose loss is not finite are passed over.
    """
    finite = list(filter(math.isfinite, losses))
    recent = finite[-window:]
    if len(recent) < window:
        return
    early, late = recent[: window // 2], recent[window // 2 :]
    spread = statistics.pstdev(recent)
    noise = 2 * spread * (1 / len(early) + 1 / len(late)) ** 0.5
    moving = abs(statistics.fmean(late) - statistics.fmean(early)) > noise
    has_learned = finite[0] - statistics.fmean(late) > max(2 * spread, 1e-6)
    if not moving and not has_learned:
        raise_flag(
            state,
            "loss_flat",
            f"the training loss has not moved beyond noise over {window} reports "
            f"({recent[0]:.4f} to {recent[-1]:.4f}).",
        )
