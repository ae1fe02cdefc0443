"""plan.json: what a run sets out to do, for those who watch it and for those who read it later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from nested_core.errors import DamagedError
from nested_core.storage.json_file import JsonFile
from nested_core.text.loss_format import format_loss
from nested_core.text.value_format import format_count


@dataclass(frozen=True, kw_only=True)
class TimePlan:
    """What came of `training.minutes`.

    minutes: as they were asked for.
    steps: optimizer steps of the whole run, as they were fixed before the first one.
    seconds_a_step, seconds_to_begin, seconds_to_judge: of a step with its share of evaluations and
        checkpoints, until the first one, and from the end of the last to the verdict, as they were
        measured then; the steps follow from them.
    began: when the command began that works on the run, in seconds since 1970.
    spent: seconds that earlier commands worked on the run.
    blas_threads: of OpenBLAS, in all commands of the run; None without it, and in older plans.
    """

    minutes: float
    steps: int
    seconds_a_step: float
    seconds_to_begin: float
    seconds_to_judge: float
    began: float
    spent: float
    blas_threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long a run is, what it is evaluated on, and the memory that it should need.

    steps, iterations: optimizer steps and micro-batches of the whole run.
    epochs: passes over the training data of the whole run.
    first_step: where this process went on from; 0 is the beginning.
    resumed_at: every step that a process went on from after an earlier one had ended, ascending.
    rank_counts: from which step on how many processes shared each batch, such as (0, 2), (40, 1).
    ended_by: what ended processes of the last command that went on by itself: signals, or
        `hang_timeout`.
    frequencies: of each tier, the fastest first.
    offers_best: whether the adapter of the lowest validation loss is offered, or the last one.
    select_by: what chooses the best one: `loss`, or the suite whose answers do.
    training_file: the file that is trained on.
    validation_file, validation_examples: what each evaluation reads; None and 0 without any.
    memory_forecast_gb, memory_limit_gb: the predicted peak or None, and what the device or
        `training.memory_limit_gb` allows, in 10^9 bytes.
    time: what came of `training.minutes`; None without them.
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

    def describe_ends(self) -> str | None:
        """That its process was killed and went on, and that it was cut; None without either."""
        sentences = []
        if self.ended_by:
            times = "once" if len(self.ended_by) == 1 else f"{len(self.ended_by)} times"
            signals = ", ".join(dict.fromkeys(self.ended_by))
            sentences.append(
                f"The training process was killed {times} ({signals}) and went on by itself."
            )
        if self.time is not None and self.steps < self.time.steps:
            cut = f"after step {self.steps:,} of {self.time.steps:,}"
            sentences.append(f"Training was cut {cut}, in time for the verdict.")
        return " ".join(sentences) or None

    def describe_rank_counts(self) -> str | None:
        """That the number of ranks changed on the way; None if it stayed the same."""
        if len(self.rank_counts) < 2:
            return None
        counts = ", ".join(f"{ranks} from step {step:,} on" for step, ranks in self.rank_counts)
        return (
            f"The number of processes that share each batch has changed: {counts}. Weights and "
            f"moments were kept. Sums are rounded in another order since, so the run is not equal "
            f"bit for bit to one that kept its number."
        )

    def describe_validation(self) -> str:
        """The examples of an evaluation: "valid.jsonl, 10 examples"."""
        return f"{self.validation_file}, {format_count(self.validation_examples, 'example')}"

    def passes_until(self, step: int) -> float:
        """Passes over the training data up to a step."""
        return self.epochs * step / self.steps if self.steps else 0.0


def list_resumptions(earlier: TrainingPlan | None, first_step: int) -> tuple[int, ...]:
    """`resumed_at` of a process that begins at `first_step`, after the processes of `earlier`.

    Resumptions beyond that step are left out: what was trained after them was given up.
    """
    known = () if earlier is None else earlier.resumed_at
    return tuple(sorted({step for step in (*known, first_step) if 0 < step <= first_step}))


def list_rank_counts(
    earlier: TrainingPlan | None, first_step: int, ranks: int
) -> tuple[tuple[int, int], ...]:
    """`rank_counts` of `ranks` processes that begin at `first_step`, after those of `earlier`."""
    counts = () if earlier is None else earlier.rank_counts
    known = [(step, count) for step, count in counts if step < first_step]
    if known and known[-1][1] == ranks:
        return tuple(known)
    return (*known, (first_step, ranks))


PLAN_FILE = JsonFile(TrainingPlan, 2**20)
write_plan = PLAN_FILE.write


def note_ends(path: Path, ends: Sequence[str]) -> None:
    """Write what ended processes of a command into plan.json, where there is one."""
    plan = read_plan(path)
    if plan is not None:
        write_plan(path, replace(plan, ended_by=tuple(ends)))


def read_plan(path: Path) -> TrainingPlan | None:
    """The plan, or None if none can be read: it is shown, and nothing rests on it."""
    try:
        return PLAN_FILE.read(path)
    except (DamagedError, OSError):
        return None


StepLoss = tuple[int, float | None]  # None: not finite


def describe_last_losses(
    records: Sequence[Mapping[str, Any]], plan: TrainingPlan | None
) -> dict[str, str]:
    """`training loss` and `validation loss` of metrics.jsonl, each as below where there is one."""
    described = {}
    report = next((r for r in reversed(records) if "loss" in r), None)
    if report is not None:
        last = (report["step"], report["loss"])
        described["training loss"] = describe_training_loss(last, plan)
    losses = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    if losses:
        finite = [point for point in losses if point[1] is not None]
        lowest = min(finite, key=itemgetter(1), default=None)
        described["validation loss"] = describe_validation_loss(losses[-1], lowest, plan)
    return described


def join_last_losses(records: Sequence[Mapping[str, Any]], plan: TrainingPlan | None) -> str:
    """Both losses in a line, or that nothing was reported yet."""
    losses = describe_last_losses(records, plan)
    return "; ".join(f"{name} {text}" for name, text in losses.items()) or "no report yet"


def describe_training_loss(last: StepLoss, plan: TrainingPlan | None) -> str:
    """`0.1234 (train.jsonl, mean since the last report, step 40)`."""
    step, loss = last
    data = [] if plan is None else [plan.training_file]
    return _describe_loss(loss, [*data, "mean since the last report", f"step {step:,}"])


def describe_validation_loss(
    last: StepLoss, lowest: StepLoss | None, plan: TrainingPlan | None
) -> str:
    """`0.2345 (valid.jsonl, 10 examples, step 40), lowest 0.1999 (step 30)`."""
    step, loss = last
    data = []
    if plan is not None and plan.validation_file is not None:
        data.append(plan.describe_validation())
    text = _describe_loss(loss, [*data, f"step {step:,}"])
    if lowest is None or lowest[0] == step:
        return text
    return f"{text}, lowest {_describe_loss(lowest[1], [f'step {lowest[0]:,}'])}"


def _describe_loss(loss: float | None, details: Sequence[str]) -> str:
    return f"{format_loss(loss)} ({', '.join(details)})"
