"""plan.json: how long a run will be and what it is evaluated on, for `status` and the pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from nested_core.errors import DamagedError
from nested_core.records.result import TrainResult
from nested_core.storage.json_file import JsonFile
from nested_core.text.loss_format import format_loss
from nested_core.text.value_format import format_count


@dataclass(frozen=True, kw_only=True)
class TimePlan:
    """How the time of `training.minutes` was turned into a number of steps.

    minutes: the configured time.
    seconds_a_step: the measured time of a step with its share of evaluations and checkpoints.
    seconds_to_judge: from the end of the last step to the verdict.
    began: when the command that trains now began, in seconds since 1970.
    spent: seconds that earlier commands worked on this run.
    worked: seconds that the command that trains now has worked on it, as it noted last.
    blas_threads: OpenBLAS's threads in all commands of the run; None without OpenBLAS.
    """

    minutes: float
    seconds_a_step: float
    seconds_to_judge: float
    began: float
    spent: float
    worked: float = 0.0
    blas_threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long a run is, what it is evaluated on, and how much memory it should need.

    steps, iterations: optimizer steps and micro-batches of the whole run.
    epochs: passes over the training data of the whole run.
    first_step: the step from which this process started; 0 for a new run.
    resumed_at: every step from which a process resumed, ascending.
    rank_counts: pairs (first step, number of processes that share each batch), such as (0, 2), (40,
        1).
    ended_by: what killed the training processes that the last command restarted: signal names, or
        `hang_timeout`.
    frequencies: how often each tier is updated, in steps, fastest tier first.
    offers_best: whether the run offers the best adapter or the last one.
    select_by: what chooses the best adapter: `loss`, or the name of a suite.
    training_file: the file that is trained on.
    validation_file, validation_examples: what each evaluation reads; None and 0 without
        evaluations.
    memory_forecast_gb: the predicted peak in 10^9 bytes; None without a forecast.
    memory_limit_gb: what the device or `training.memory_limit_gb` allows, in 10^9 bytes.
    time: how `training.minutes` was planned; None if it is not set.
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
    memory_forecast_gb: float | None
    memory_limit_gb: float
    resumed_at: tuple[int, ...] = ()
    rank_counts: tuple[tuple[int, int], ...] = ()
    select_by: str = "loss"
    ended_by: tuple[str, ...] = ()
    time: TimePlan | None = None

    def describe_ends(self, result: TrainResult | None) -> str | None:
        """Describe restarts of killed training processes, early stopping, and a cut for the time.

        Returns None if none of them happened. result: what training ended with, if it has ended.
        """
        sentences = []
        if self.ended_by:
            times = "once" if len(self.ended_by) == 1 else f"{len(self.ended_by)} times"
            signals = ", ".join(dict.fromkeys(self.ended_by))
            sentences.append(
                f"The training process was killed {times} ({signals}) and went on by itself."
            )
        if result is not None and result.ended == "time":
            cut = f"after step {result.step:,} of {self.steps:,}"
            sentences.append(f"Training was cut {cut}, in time for the verdict.")
        if result is not None and result.ended == "patience":
            sentences.append(
                f"Early stopping ended training after step {result.step:,} of {self.steps:,}: "
                f"evaluations brought no improvement any more (training.early_stop_patience)."
            )
        return " ".join(sentences) or None

    def describe_rank_counts(self) -> str | None:
        """Describe a change in the number of data-parallel processes; None if it never changed."""
        if len(self.rank_counts) < 2:
            return None
        counts = ", ".join(f"{ranks} from step {step:,} on" for step, ranks in self.rank_counts)
        return (
            f"The number of processes that share each batch has changed: {counts}. Weights and "
            f"moments were kept. Sums are rounded in another order since, so the run is not equal "
            f"bit for bit to one that kept its number."
        )

    def describe_validation(self) -> str:
        """Describe the validation data: "valid.jsonl, 10 examples"."""
        return f"{self.validation_file}, {format_count(self.validation_examples, 'example')}"

    def passes_until(self, step: int) -> float:
        """Return the number of passes over the training data up to a step."""
        return self.epochs * step / self.steps if self.steps else 0.0


def list_resumptions(earlier: TrainingPlan | None, first_step: int) -> tuple[int, ...]:
    """Return `resumed_at` for a process that starts at `first_step`.

    earlier: the plan of the processes before it. Resumptions after `first_step` are dropped, since
        the steps after it are trained anew.
    """
    resumed = {*(() if earlier is None else earlier.resumed_at), first_step}
    return tuple(sorted(step for step in resumed if 0 < step <= first_step))


def list_rank_counts(
    earlier: TrainingPlan | None, first_step: int, ranks: int
) -> tuple[tuple[int, int], ...]:
    """Return `rank_counts` for `ranks` processes that start at `first_step`.

    earlier: the plan of the processes before them.
    """
    counts = () if earlier is None else earlier.rank_counts
    before = [(step, count) for step, count in counts if step < first_step]
    if before and before[-1][1] == ranks:
        return tuple(before)
    return (*before, (first_step, ranks))


PLAN_FILE = JsonFile(TrainingPlan, 2**20)
write_plan = PLAN_FILE.write


def note_ends(path: Path, ends: Sequence[str]) -> None:
    """Record in plan.json what killed the training processes; without the file, do nothing."""
    plan = read_plan(path)
    if plan is not None:
        write_plan(path, replace(plan, ended_by=tuple(ends)))


def read_plan(path: Path) -> TrainingPlan | None:
    """Read plan.json; None if it is missing or damaged, since the plan is only displayed."""
    try:
        return PLAN_FILE.read(path)
    except (DamagedError, OSError):
        return None


StepLoss = tuple[int, float | None]  # None: not finite


def describe_last_losses(
    records: Sequence[Mapping[str, Any]], plan: TrainingPlan | None
) -> dict[str, str]:
    """Describe the last training and validation loss of metrics.jsonl, by their names.

    Keys are `training loss` and `validation loss`; one that was never reported is left out.
    """
    described = {}
    report = next((r for r in reversed(records) if "loss" in r), None)
    if report is not None:
        described["training loss"] = describe_training_loss((report["step"], report["loss"]), plan)
    losses = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    if losses:
        finite = [point for point in losses if point[1] is not None]
        lowest = min(finite, key=itemgetter(1), default=None)
        described["validation loss"] = describe_validation_loss(losses[-1], lowest, plan)
    return described


def join_last_losses(records: Sequence[Mapping[str, object]], plan: TrainingPlan | None) -> str:
    """Describe the last training and validation loss in one line, or say "no report yet"."""
    losses = describe_last_losses(records, plan)
    return "; ".join(f"{name} {text}" for name, text in losses.items()) or "no report yet"


def describe_training_loss(last: StepLoss, plan: TrainingPlan | None) -> str:
    """Describe a training loss: `0.1234 (train.jsonl, mean since the last report, step 40)`."""
    step, loss = last
    data = [] if plan is None else [plan.training_file]
    return _describe_loss(loss, [*data, "mean since the last report", f"step {step:,}"])


def describe_validation_loss(
    last: StepLoss, lowest: StepLoss | None, plan: TrainingPlan | None
) -> str:
    """Describe a validation loss, and the lowest one if it is an earlier one.

    Example: `0.2345 (valid.jsonl, 10 examples, step 40), lowest 0.1999 (step 30)`.
    """
    step, loss = last
    data = []
    if plan is not None and plan.validation_file is not None:
        data.append(plan.describe_validation())
    text = _describe_loss(loss, [*data, f"step {step:,}"])
    if lowest is None or lowest[0] == step:
        return text
    return f"{text}, lowest {_describe_loss(lowest[1], [f'step {lowest[0]:,}'])}"


def _describe_loss(loss: float | None, details: Sequence[str]) -> str:
    """Format a loss with details in brackets."""
    return f"{format_loss(loss)} ({', '.join(details)})"
