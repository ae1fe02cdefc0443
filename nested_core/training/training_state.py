"""The progress of a training run, and what a checkpoint's state.json records of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nested_core.errors import DamagedError
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.checkpoint_verification import STATE_NAME


@dataclass
class TrainingState:
    """Position, best evaluation so far, and the sums of the open report.

    With the arrays of a checkpoint, this is all that a resumed run needs.

    Attributes:
        step: optimizer steps done.
        iteration: micro-batches done, which is also the index of the next one.
        observed: whether the evaluation that was due at this step is done; an interrupted
            evaluation is repeated on resume.
        reported: the number of records in metrics.jsonl.
        random_key: the key of the next random draw, if draws continue from step to step; otherwise
            the random state of a step follows from the seed and the step.
        flushed: whether accumulated gradients were applied at the end of training; `flush_steps`
            has the steps of all such flushes.
        ended: why training is over, `iterations`, `patience` or `time`; None while it is not.
            More iterations continue a run, but not one that ended by patience.
        wrong, is_candidate: the share of wrong answers at the last evaluation, to the suite that
            selects the step (0 if the loss does), and whether the run may offer its step.
        lowest_val_loss, lowest_wrong: what the next evaluation has to improve on for patience.
        before_evaluation: the values of BEST_KEYS before the last evaluation, which a flush of
            accumulated gradients makes invalid.
        question_share: the share of the questions to ask from now on.
        asked_step: the step at which questions were last asked.
    """

    # Position
    step: int = 0
    iteration: int = 0
    trained_tokens: int = 0
    observed: bool = True
    reported: int = 0
    open_report: dict[str, float] = field(default_factory=dict)
    random_key: list[int] | None = None

    # The end
    flushed: bool = False
    flush_steps: list[int] = field(default_factory=list)
    ended: str | None = None

    # Losses
    train_loss: float | None = None
    val_loss: float | None = None
    wrong: float = 0.0
    is_candidate: bool = False
    evaluated_step: int | None = None
    best_step: int | None = None
    best_val_loss: float | None = None
    best_wrong: float = 0.0
    lowest_val_loss: float | None = None
    lowest_wrong: float = 0.0
    evaluations_without_improvement: int = 0
    before_evaluation: dict[str, Any] = field(default_factory=dict)
    question_share: float = 1.0
    asked_step: int = 0

    # Checks
    verified_steps: list[int] = field(default_factory=list)
    red_flags: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """Return the state as plain JSON values; a number that is not finite becomes None."""
        return {name: finite_or_none(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrainingState:
        """Read what `to_json` wrote. Other keys are ignored; KeyError if one is missing."""
        return cls(**{field.name: value[field.name] for field in fields(cls)})

    def record_gradient_flush(self) -> None:
        """Record a flush at this step, which makes an evaluation of this step invalid.

        The best step and the count of patience are again what they were before it.
        """
        self.flushed = True
        self.flush_steps.append(self.step)
        if self.evaluated_step == self.step:
            vars(self).update(self.before_evaluation)

    def steps_to_keep(self, *, may_flush: bool) -> list[int]:
        """Return the steps whose checkpoints may still be offered.

        With `may_flush`, a flush could still replace the best step by the best before it.
        """
        steps = [self.best_step]
        if may_flush and self.best_step == self.step:
            steps.append(self.before_evaluation["best_step"])
        return [step for step in steps if step is not None]

    def record_evaluation(self, val_loss: float, *, is_candidate: bool, wrong: float = 0.0) -> bool:
        """Record a validation loss; return whether it is the best among the candidates.

        `wrong` is the share of wrong answers to the suite that selects the step.
        """
        self.before_evaluation = {name: getattr(self, name) for name in BEST_KEYS}
        self.val_loss = val_loss
        self.wrong = wrong
        self.is_candidate = is_candidate
        self.evaluated_step = self.step
        is_best = is_candidate and self.improves_on(self.best_wrong, self.best_val_loss)
        if is_best:
            self.best_step = self.step
            self.best_val_loss = val_loss
            self.best_wrong = wrong
        return is_best

    def improves_on(self, wrong: float, val_loss: float | None, *, min_delta: float = 0.0) -> bool:
        """Whether the last evaluation is better than one with these values.

        Wrong answers are compared first, and the loss only breaks ties: it has to be lower by more
        than `min_delta`. A loss that is not finite is no improvement; any other one is, on None.
        """
        loss = math.nan if self.val_loss is None else self.val_loss
        if val_loss is None or not math.isfinite(loss):
            return math.isfinite(loss)
        return self.wrong < wrong or (self.wrong == wrong and loss < val_loss - min_delta)

    def count_without_improvement(self, *, min_delta: float, flushes: bool = False) -> None:
        """Update the count of evaluations in a row without improvement, after one was recorded.

        Counted are only evaluations at which training could end with an adapter to offer: those of
        candidates, and after step 0 all if the end applies what slow tiers have accumulated
        (`flushes`). A better one resets the count, by what selects the step (`improves_on`).
        """
        if not (self.is_candidate or (flushes and self.step > 0)):
            return
        if self.improves_on(self.lowest_wrong, self.lowest_val_loss, min_delta=min_delta):
            self.lowest_val_loss = self.val_loss
            self.lowest_wrong = self.wrong
            self.evaluations_without_improvement = 0
        else:
            self.evaluations_without_improvement += 1

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in a row brought no improvement; None never stops."""
        return patience is not None and self.evaluations_without_improvement >= patience


BEST_KEYS = (
    "best_step",
    "best_val_loss",
    "best_wrong",
    "lowest_val_loss",
    "lowest_wrong",
    "evaluations_without_improvement",
)
# Of a checkpoint's state.json, beside the training state: the configured `iters`, of which a larger
# number on resume continues training, and what the gate judges by.
EVIDENCE_KEYS = {"wanted_iterations", "found", "tiers", "logits"}


def require_whole_state(recorded: Mapping[str, object], checkpoint: Path) -> None:
    """Raise DamagedError if a key of a checkpoint's state.json is missing."""
    names = {field.name for field in fields(TrainingState)}
    if missing := sorted((names | EVIDENCE_KEYS) - recorded.keys()):
        raise DamagedError(
            f"{checkpoint / STATE_NAME} has no {' and no '.join(missing)}: it is not what training "
            f"wrote. Bring back what was there, or train again in a new run."
        )
