"""Checks whether training has an effect, by its updates, checkpoints and losses.

A red flag is a warning that is also stored in the run's state: something that should have changed
did not. Whether the adapter is good is decided by the gate.
"""

from __future__ import annotations

import filecmp
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from nested_core.backend import to_float, to_int
from nested_core.errors import SilentUpdateWarning
from nested_core.optim.gradients import Flat, find_gradient_mark
from nested_core.optim.named_updates import UpdateReport, find_not_applied, flatten
from nested_core.optim.tier_counters import COUNTERS_KEY
from nested_core.storage.adapter import WEIGHTS_NAME
from nested_core.storage.safetensors_files import load_arrays
from nested_core.text.loss_format import format_change
from nested_core.training.parameter_packing import Packing
from nested_core.training.train_step import StepResult
from nested_core.training.training_setup import TrainingSetup
from nested_core.training.training_state import TrainingState

ROUNDED_SHARE = 0.9  # of the moved float32 weights: rounding that many away is flagged
FLAT_SHARE = 0.05  # of the loss: a larger difference between half windows always counts as movement


def warn_once(state: TrainingState, code: str, message: str) -> None:
    """Warn of a red flag and store it in the state, once in a run for each code."""
    if not any(flag.startswith(f"{code}:") for flag in state.red_flags):
        state.red_flags.append(f"{code}: {message}")
        # The step takes the place of file and line of the code, which mean nothing to a user.
        warnings.warn_explicit(
            f"{code}: {message}", SilentUpdateWarning, "training step", state.step
        )


def warn_of_lost_updates(state: TrainingState, report: UpdateReport, idle: Sequence[str]) -> None:
    """Flag updates that did not arrive in the model, and due parameters that did not move.

    A flag is a warning, given once in a run, that is also recorded in `state`.

    `idle` names the parameters that could not move, such as lora_a while lora_b is still zero.
    """
    if report.not_applied:
        warn_once(
            state,
            "updates_not_applied",
            f"at step {state.step} {len(report.not_applied)} of {report.checked} computed updates "
            f"are not in the model, {report.not_applied[0]} among them. It is not being trained.",
        )
    unmoved = [name for name in report.unmoved if name not in set(idle)]
    if unmoved and not report.not_applied:
        warn_once(
            state,
            "parameters_unchanged",
            f"the update of step {state.step} left {len(unmoved)} of {report.checked} parameters "
            f"as they were, {unmoved[0]} among them: is the learning rate too small?",
        )


def warn_of_unchanged_checkpoint(state: TrainingState, checkpoint: Path, initial: Path) -> None:
    """Flag a checkpoint whose adapter file equals the initial adapter's, byte for byte.

    Both files are written by `storage.safetensors_files.save_arrays`, which writes equal arrays as
    equal bytes. Only call this after every tier was due, and not at step 1, whose learning rate may
    be 0 in a warm-up.
    """
    if filecmp.cmp(checkpoint / WEIGHTS_NAME, initial / WEIGHTS_NAME, shallow=False):
        warn_once(
            state,
            "checkpoint_unchanged",
            f"the checkpoint of step {state.step} equals the initial adapter, byte for byte: "
            f"nothing has been trained yet.",
        )


def warn_of_rounded_updates(
    state: TrainingState,
    adapter: Mapping[str, mx.array],
    masters: Mapping[str, mx.array],
    initial: Path,
) -> None:
    """Flag trained float32 weights whose change is mostly lost in the narrower saved dtype.

    That is: more than ROUNDED_SHARE of the weights that moved are saved with their initial value.
    The flag is a warning that is also recorded in `state`.

    adapter: the tensors as they are saved.
    masters: the float32 weights of tensors that are saved in fewer bits.
    initial: the folder of the initial adapter.
    """
    before = load_arrays(initial / WEIGHTS_NAME)
    moved = lost = 0
    for name, master in masters.items():
        has_moved = master != before[name]
        moved += to_int(has_moved.sum())
        lost += to_int((has_moved & (adapter[name] == before[name])).sum())
    if lost > ROUNDED_SHARE * moved:
        warn_once(
            state,
            "updates_rounded_away",
            f"of {moved:,} weights that training moved, {lost:,} are saved as what they were "
            f"before: the learning rate is too small for the dtype that they are saved in.",
        )


def warn_of_flat_loss(state: TrainingState, losses: Sequence[float], window: int) -> None:
    """Flag a training loss whose last `window` reports show no movement beyond their noise.

    The loss moves if the mean of the later half differs from that of the earlier half by more than
    two standard errors, or by more than FLAT_SHARE of it. A loss that is two standard deviations
    below the first report has converged and is not flagged. Reports whose loss is not finite are
    left out.
    """
    finite = list(filter(math.isfinite, losses))
    recent = finite[-window:]
    if len(recent) < window:
        return
    middle = window // 2
    early, late = statistics.fmean(recent[:middle]), statistics.fmean(recent[middle:])
    spread = statistics.pstdev(recent)
    noise = 2 * spread * (1 / middle + 1 / (window - middle)) ** 0.5
    is_moving = abs(late - early) > min(noise, FLAT_SHARE * early)
    has_learned = finite[0] - late > max(2 * spread, 1e-6)
    if not is_moving and not has_learned:
        warn_once(
            state,
            "loss_flat",
            f"the training loss has not changed significantly over {window} reports "
            f"(means of their first and second half: {format_change(early, late)}).",
        )


class UpdateCheck:
    """Reads updated parameters back from the model, and flags updates that did not arrive.

    checked_due: the combinations of due tiers of which an update was checked.
    """

    def __init__(self, setup: TrainingSetup) -> None:
        """Create it with no combination of due tiers checked."""
        self._setup = setup
        self.checked_due: set[tuple[int, ...]] = set()

    def check(
        self, state: TrainingState, step: StepResult, *, packing: Packing, written: Flat
    ) -> None:
        """Check that the parameters updated by a step are in the model.

        Warns, once in a run, of parameters whose update is not in the model, and of updates that
        changed nothing; nothing is raised. The step is recorded in `state.verified_steps` in any
        case: it was checked, whatever was found.

        step: the step's parameters before and after the update, packed.
        packing: how small parameters are packed into one array, to find them by name.
        written: all parameters by name, as they were written into the model.
        """
        self.checked_due.add(step.due)
        names = [name for key in step.updates for name in packing.arrays[key].shapes]
        expected = {name: written[name] for name in names}
        report = UpdateReport(
            checked=len(names),
            not_applied=find_not_applied(expected, self._setup.model),
            unmoved=tuple(packing.find_unmoved(step.before, step.updates)),
        )
        warn_of_lost_updates(
            state, report, self._parameters_that_cannot_move(state.step, report.unmoved)
        )
        state.verified_steps.append(state.step)

    def _parameters_that_cannot_move(self, step: int, names: Sequence[str]) -> list[str]:
        """Return which of the parameters could not have moved at this step.

        The optimizer's state has a mark for each parameter that ever had a gradient.

        All of them after a skipped step or with a learning rate of 0; else those whose tier was not
        due or that had no gradient yet.
        """
        if not names:
            return []
        optimizer = self._setup.optimizer
        tiers = self._setup.tiers
        was_skipped = to_int(optimizer.state[COUNTERS_KEY]["nonfinite_in_a_row"]) > 0
        has_rate = to_float(optimizer.learning_rate) > 0.0
        if was_skipped or not has_rate:
            return list(names)
        due = tiers.due(step)
        state = flatten(optimizer.state)
        gradient_marks = {name: find_gradient_mark(state, name) for name in names}
        return [
            name
            for name, mark in gradient_marks.items()
            if tiers.tensors[name] not in due or mark is None or not bool(mx.any(mark).item())
        ]
