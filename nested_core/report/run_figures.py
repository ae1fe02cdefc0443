"""The figures of a run that every view leads with, so that all of them tell the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nested_core.errors import NestedTuneError
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import read_json_object
from nested_core.training.reports.training_plan import StepLoss, TrainingPlan


@dataclass(frozen=True)
class RunFigures:
    """What a run offers and what it reported last; losses in nats a token.

    offered_step: the step whose adapter is offered; None before training has ended.
    offered_val_loss: its validation loss; None where it has none, or one that is not finite.
    gate_loss: the gate's loss of it, on the examples that the gate judged by; None likewise.
    last_train_loss, last_val_loss: the step and the loss of the last report and evaluation, the
        loss None where it is not finite; None where there was none yet.
    """

    offered_step: int | None
    offered_val_loss: float | None
    gate_loss: float | None
    last_train_loss: StepLoss | None
    last_val_loss: StepLoss | None

    @classmethod
    def from_records(
        cls, records: Sequence[Mapping[str, Any]], offered_step: int | None, gate_loss: float | None
    ) -> RunFigures:
        """From the records of metrics.jsonl and what result.json and gate.json say."""
        last: dict[str, StepLoss] = {}
        offered = None
        for record in records:
            step = int(record.get("step", 0))
            last.update((key, (step, record[key])) for key in ("loss", "val_loss") if key in record)
            if step == offered_step and "val_loss" in record:
                offered = record["val_loss"]
        return cls(offered_step, offered, gate_loss, last.get("loss"), last.get("val_loss"))

    def leading_to_json(self) -> dict[str, Any]:
        """The figures that lists lead with, under the names that they have in `--json`."""
        return {
            "offered_step": self.offered_step,
            "offered_val_loss": self.offered_val_loss,
            "gate_loss": self.gate_loss,
        }

    def not_finite(self, names: Mapping[str, str]) -> list[str]:
        """Which of the last losses are not finite: null in JSON, as those that were never measured.

        `names` has the name that the caller gives each of `last_train_loss` and `last_val_loss`.
        """
        lasts: dict[str, StepLoss | None] = {
            "last_train_loss": self.last_train_loss,
            "last_val_loss": self.last_val_loss,
        }
        return [names[key] for key, last in lasts.items() if last is not None and last[1] is None]


def read_offered_step(run: RunDirectory) -> int | None:
    """The step whose adapter a run without a verdict offers, by result.json.

    None before training has ended, and for a result.json that cannot be read: the run writes it
    again.
    """
    try:
        step = read_json_object(run.result).get("adapter_step")
    except (NestedTuneError, OSError):
        return None
    return step if isinstance(step, int) else None


def describe_length(step: int, steps: int | None, plan: TrainingPlan | None) -> str:
    """What was trained: "200 of 200 steps, 20 passes over train.jsonl"."""
    text = f"{step:,} steps" if steps is None else f"{step:,} of {steps:,} steps"
    passes = None if plan is None else plan.passes_until(step)
    if plan is None or passes is None:
        return text
    noun = "pass" if f"{passes:.3g}" == "1" else "passes"
    return f"{text}, {passes:.3g} {noun} over {plan.training_file}"
