"""The runs of a sweep compared: a row each, the best that the gate verified, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nested_core.config.sections import RegistrySection
from nested_core.errors import DamagedError
from nested_core.records.run_status import Run
from nested_core.registry import list_versions
from nested_core.registry.promotion_policy import registry_location
from nested_core.rooms.sweep.record import Arm, SweepRecord
from nested_core.storage.adapter import read_adapter
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.document import Document, Figures, Table, Text
from nested_core.text.loss_format import format_loss, loss_name_for_file
from nested_core.text.svg_chart import Chart, Curve


@dataclass(frozen=True)
class SweepRunResult:
    """What one run of a sweep came to.

    val_loss is the best validation loss, by which the sweep chooses; loss is the gate's, on its
    held-out examples. Each is None if it was not measured.
    """

    run_dir: str
    point: dict[str, Any]
    state: str
    message: str
    has_passed: bool
    loss: float | None
    file: str | None = None
    val_loss: float | None = None

    @classmethod
    def read_from_run(
        cls,
        run: RunDirectory,
        point: dict[str, Any],
        state: str,
        message: str,
        *,
        is_candidate: bool = False,
    ) -> Self:
        """Read the verdict from the run directory; without one the run did not pass.

        `state` is the name of the run's state, which is its outcome; `is_candidate` says that the
        run completed and registered what the gate passed.
        """
        read = Run(run)
        verdict, result = read.verdict, read.result
        validation = None if verdict is None else verdict.validation
        val_loss = None if result is None else result.best_val_loss
        if result is not None and val_loss is None:
            val_loss = result.val_loss
        return cls(
            str(run.path),
            point,
            state,
            message,
            is_candidate and verdict is not None and verdict.has_passed,
            loss=None if validation is None else validation.loss_after,
            file=None if validation is None else validation.file,
            val_loss=val_loss,
        )

    def describe(self) -> str:
        """The settings of this run and the gate's loss."""
        settings = ", ".join(f"{key}={value}" for key, value in self.point.items())
        if self.loss is None:
            return settings
        name = loss_name_for_file(self.file)
        return f"{settings} ({name} {format_loss(self.loss)})"


def describe_sweep(record: SweepRecord, runs: Sequence[RunDirectory], summary: str) -> Document:
    """A page: the outcome, every arm's validation loss over the steps, and a table."""
    curves = []
    for number, (arm, run) in enumerate(zip(record.arms, runs, strict=True)):
        points = Run(run).points("val_loss")
        curves.append(Curve(f"{number}: {arm.describe()}", points, has_dots=True))
    unit = Run(runs[0]).loss_unit
    chart = Chart("Validation loss of each setting", "step", unit, curves)
    table = Table(describe_scores(record, unit), sweep_columns(record), sweep_rows(record))
    return Document("Sweep", [Text(summary, is_headline=True), Figures([[chart]]), table])


def describe_scores(record: SweepRecord, unit: str) -> str:
    """What the figures of the table of arms are."""
    if record.select_by == "loss":
        return f"Validation loss in {unit}, the lowest up to each step"
    return f"Right answers to {record.select_by}, the most up to each step"


def sweep_columns(record: SweepRecord) -> tuple[str, ...]:
    """The heads of the table of arms."""
    return ("", "setting", *(f"step {step}" for step in record.rungs), "")


def sweep_rows(record: SweepRecord) -> list[tuple[object, ...]]:
    """A row for each arm: its number, its settings, its score at each rung, what became of it."""
    rows: list[tuple[object, ...]] = []
    for number, arm in enumerate(record.arms):
        scores = [_format_score(arm, step) for step in record.rungs]
        ended = "chosen" if number == record.chosen else ""
        rows.append((number, arm.describe(), *scores, ended))
    return rows


def _format_score(arm: Arm, step: int) -> str | None:
    if step not in arm.scores:
        return None
    score = arm.scores[step]
    if score is None:
        return "diverged"
    return format_loss(score[0]) if len(score) == 1 else f"{1 - score[0]:.0%} right"


def choose_best_run(outcomes: Sequence[SweepRunResult]) -> SweepRunResult | None:
    """The verified run of the lowest validation loss; None without a verified run.

    Test examples choose nothing: they judge the one choice. Without any validation loss the gate's
    decides.
    """

    def order(outcome: SweepRunResult) -> tuple[float, float]:
        losses = (outcome.val_loss, outcome.loss)
        first, second = (float("inf") if loss is None else loss for loss in losses)
        return first, second

    return min((one for one in outcomes if one.has_passed), key=order, default=None)


def find_registered_version(section: RegistrySection, outcome: SweepRunResult) -> str:
    """The version that a run registered: its adapter's digest."""
    registry, name = registry_location(section)
    version = read_adapter(RunDirectory(Path(outcome.run_dir)).adapter).digest()
    if version not in list_versions(registry, name):
        raise DamagedError(f"{outcome.run_dir} passed the gate, and is not in {registry / name}.")
    return version
