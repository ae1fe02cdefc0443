"""plan.json: what a run sets out to do, for those who watch it and for those who read it later."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from nested_core.errors import DamagedError
from nested_core.storage.atomic import write_json
from nested_core.storage.strict_files import read_json

MAX_PLAN_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long a run is, what it is evaluated on, and the memory that it should need.

    steps, iterations: optimizer steps and micro-batches of the whole run.
    epochs: passes over the training data of the whole run.
    first_step: where this process went on from; 0 is the beginning.
    resumed_at: every step that a process went on from after an earlier one had ended, ascending.
    frequencies: of each tier, the fastest first.
    offers_best: whether the adapter of the lowest validation loss is offered, or the last one.
    training_file: the file that is trained on.
    validation_file, validation_examples: what each evaluation reads; None and 0 without any.
    memory_forecast_gb, memory_limit_gb: the predicted peak, and what the device or
        `training.memory_limit_gb` allows, in 10^9 bytes.
    """

    steps: int
    iterations: int
    epochs: float
    first_step: int
    frequencies: tuple[int, ...]
    offers_best: bool
    training_file: str
    validation_file: str | None
    validation_examples: int
    memory_forecast_gb: float
    memory_limit_gb: float
    resumed_at: tuple[int, ...] = ()

    def describe_validation(self) -> str:
        """The examples of an evaluation: "valid.jsonl, 10 examples"."""
        noun = "example" if self.validation_examples == 1 else "examples"
        return f"{self.validation_file}, {self.validation_examples:,} {noun}"

    def passes_until(self, step: int) -> float:
        """Passes over the training data up to a step."""
        return self.epochs * step / self.steps if self.steps else 0.0


def list_resumptions(earlier: TrainingPlan | None, first_step: int) -> tuple[int, ...]:
    """`resumed_at` of a process that begins at `first_step`, after the processes of `earlier`.

    Resumptions beyond that step are left out: what was trained after them was given up.
    """
    known = () if earlier is None else earlier.resumed_at
    return tuple(sorted({step for step in (*known, first_step) if 0 < step <= first_step}))


_PLAN_VALIDATOR = TypeAdapter(TrainingPlan)


def write_plan(path: Path, plan: TrainingPlan) -> None:
    """Write plan.json in place of an earlier one."""
    write_json(path, asdict(plan))


def read_plan(path: Path) -> TrainingPlan | None:
    """The plan, or None where none can be read: it is shown, and nothing rests on it."""
    try:
        return _PLAN_VALIDATOR.validate_python(read_json(path, MAX_PLAN_BYTES))
    except (DamagedError, ValidationError, OSError):
        return None
