"""sweep.json: what a sweep tries, how far each arm got, and which one it chose."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from nested_core.storage.json_file import JsonFile

SWEEP_NAME = "sweep.json"
Score = tuple[float, ...]


@dataclass(frozen=True)
class Arm:
    """One setting that is tried.

    point: key -> value, where it differs from the configuration; empty for that itself.
    scores: by the rung's step, the best so far, lower first: the validation loss,
        or the share of wrong answers and the loss; None if it was not finite or training
        diverged.
    """

    point: dict[str, JsonValue]
    scores: dict[int, Score | None] = field(default_factory=dict)

    def describe(self) -> str:
        """Its settings in words."""
        if not self.point:
            return "the configuration itself"
        return ", ".join(f"{key}={_format(value)}" for key, value in self.point.items())


@dataclass(frozen=True)
class SweepRecord:
    """A sweep so far; what it decides follows from this alone, so that it goes on as it began.

    select_by: `loss`, or the suite whose answers choose.
    digest: of the configuration and what was asked for; a resumed sweep has the same.
    rungs: the optimizer steps at which arms are compared; the last one is a whole run.
    budget: optimizer steps of all arms together; None if they are not bounded.
    arms: the configuration itself first.
    rounds: the arms, by number, of each round.
    seconds: of training and evaluations so far.
    chosen: the number of the chosen arm, once it is known.
    configured: the steps of a run of the configuration, of which `rungs` may end earlier.
    """

    digest: str
    select_by: str
    rungs: tuple[int, ...]
    budget: int | None
    arms: tuple[Arm, ...]
    rounds: tuple[tuple[int, ...], ...] = ()
    seconds: float = 0.0
    chosen: int | None = None
    configured: int | None = None

    @property
    def is_cut_short(self) -> bool:
        """Whether a whole run of the sweep has fewer steps than the configuration asks for."""
        return self.configured is not None and self.rungs[-1] < self.configured

    @property
    def trained(self) -> int:
        """Optimizer steps of all arms so far, up to the last rung of each."""
        return sum(max(arm.scores, default=0) for arm in self.arms)

    def with_score(self, number: int, step: int, score: Score | None) -> SweepRecord:
        """The record with an arm's score at a rung."""
        arm = replace(self.arms[number], scores=self.arms[number].scores | {step: score})
        return replace(self, arms=(*self.arms[:number], arm, *self.arms[number + 1 :]))

    def write(self, folder: Path) -> None:
        """Write sweep.json."""
        SWEEP_FILE.write(folder / SWEEP_NAME, self)


SWEEP_FILE = JsonFile(SweepRecord, 2**22)


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
