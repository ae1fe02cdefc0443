"""What a training run has done so far: all of it, with the arrays beside it, is a checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from nested_core.storage.atomic import finite_or_none


@dataclass
class TrainingState:
    """Position, best so far, and the sums of the report that is still open.

    `step` counts optimizer steps, `iteration` micro-batches; the next batch is number `iteration`.
    The random state of step n is a function of the seed and n, but for a reference run, whose
    draws follow each other: `random_key` is the key of the next one. `reported` counts the records
    in metrics.jsonl. A step that is not `observed` was stopped in its evaluation, which is made up
    for on resume.
    """

    step: int = 0
    iteration: int = 0
    trained_tokens: int = 0
    flushed: bool = False
    flush_steps: list[int] = field(default_factory=list)
    ended: bool = False
    best_step: int | None = None
    best_val_loss: float | None = None
    lowest_val_loss: float | None = None
    evaluations_without_improvement: int = 0
    val_loss: float | None = None
    train_loss: float | None = None
    evaluated_step: int | None = None
    observed: bool = True
    reported: int = 0
    open_report: dict[str, float] = field(default_factory=dict)
    random_key: list[int] | None = None
    verified_steps: list[int] = field(default_factory=list)
    red_flags: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The state as plain JSON values; a number that is not finite becomes None."""
        values: dict[str, Any] = finite_or_none(asdict(self))
        return values

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrainingState:
        """Read what `to_json` wrote; other keys are passed over."""
        known = {key: value[key] for key in cls.__dataclass_fields__ if key in value}
        return cls(**known)

    def note_flush(self) -> None:
        """Note that open chunks were applied; what was measured at this step before is void."""
        self.flushed = True
        self.flush_steps.append(self.step)
        if self.best_step == self.step:
            self.best_step = self.best_val_loss = None

    def record_evaluation(self, val_loss: float, *, is_candidate: bool, min_delta: float) -> bool:
        """Take note of a validation loss; return whether it is the best among the candidates.

        One that is not finite is no improvement, and never the best.
        """
        self.val_loss, self.evaluated_step = val_loss, self.step
        lowest = math.inf if self.lowest_val_loss is None else self.lowest_val_loss
        best = math.inf if self.best_val_loss is None else self.best_val_loss
        if val_loss < lowest - min_delta:
            self.lowest_val_loss, self.evaluations_without_improvement = val_loss, 0
        else:
            self.evaluations_without_improvement += 1
        is_best = is_candidate and val_loss < best
        if is_best:
            self.best_step, self.best_val_loss = self.step, val_loss
        return is_best
