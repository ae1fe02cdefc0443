"""A run read whole, for a person: what its files say at one moment, and which are damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.data.rules.dataset_report import DatasetReport
from nested_core.errors import NestedTuneError, describe_first_problem
from nested_core.gate.example_losses import ExampleLosses, read_example_losses
from nested_core.records.answers import (
    AnswerRecord,
    SampleAnswers,
    read_answers,
    read_sample_answers,
)
from nested_core.records.result import read_result
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import read_verdict
from nested_core.report.run_status import (
    RunFigures,
    State,
    count_steps,
    describe_state,
    last_value,
    read_offered_step,
    read_sound_verdict,
    read_start_time,
)
from nested_core.storage.manifest import matches_entry, read_manifest
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import file_type, read_json
from nested_core.text.svg_chart import Point
from nested_core.training.reports.metrics_file import cumulative_seconds, read_metrics
from nested_core.training.reports.training_plan import TrainingPlan, read_plan

Content = TypeVar("Content")


@dataclass(frozen=True, repr=False)
class RunRecord:
    """A run at one moment.

    config, plan, verdict, losses, dataset: None where the run has none yet, or the file is damaged.
    metrics: the records of metrics.jsonl; seconds: of training up to each of them.
    steps: how many the run sets out to take; None where epochs decide, before they are counted.
    red_flags: what training warned of, once it has ended.
    offered_step: the step whose adapter is offered; None before training has ended.
    problems: a sentence for each file that is damaged.
    """

    run: RunDirectory
    state: State
    started: datetime
    steps: int | None
    config: FineTuneConfig | None = None
    plan: TrainingPlan | None = None
    metrics: Sequence[dict[str, Any]] = ()
    seconds: Sequence[float] = ()
    verdict: Verdict | None = None
    losses: ExampleLosses | None = None
    dataset: DatasetReport | None = None
    sample_answers: Sequence[SampleAnswers] = ()
    red_flags: tuple[str, ...] = ()
    offered_step: int | None = None
    answers: Sequence[AnswerRecord] = ()
    problems: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"RunRecord({self.run.path}, {self.state}, step {self.step})"

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.run.path.resolve().name

    @property
    def step(self) -> int:
        """The last optimizer step that was reported."""
        return int(self.metrics[-1].get("step", 0)) if self.metrics else 0

    def last_metric(self, key: str) -> Any:
        """The last reported value of a metric, or None."""
        return last_value(self.metrics, key)

    def points(self, key: str, x: str = "step") -> list[Point]:
        """The reports of a metric as points of a curve, over steps or seconds of training."""
        places = [r.get("step", 0) for r in self.metrics] if x == "step" else self.seconds
        return [
            Point(float(place), None if metrics[key] is None else float(metrics[key]))
            for place, metrics in zip(places, self.metrics, strict=True)
            if key in metrics
        ]

    @property
    def figures(self) -> RunFigures:
        """What the run offers, and its last losses."""
        validation = None if self.verdict is None else self.verdict.validation
        gate_loss = None if validation is None else validation.loss_after
        return RunFigures.from_records(self.metrics, self.offered_step, gate_loss)


@dataclass
class _DamageTolerantReader:
    """Reads what is there, and gathers what is damaged."""

    problems: list[str] = field(default_factory=list)

    def read(self, path: Path, reader: Callable[[Path], Content]) -> Content | None:
        """What `reader` makes of the file; None where it is missing or damaged."""
        if file_type(path) == "missing":
            return None
        try:
            return reader(path)
        except NestedTuneError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{path} cannot be read: {error.strerror}.")
        return None


def read_run(run: RunDirectory, *, has_ended: bool = False) -> RunRecord:
    """Read a run in any state; `has_ended`: by the process that works on it, when it is done.

    Raises ConfigError if `run` is no run directory.
    """
    run.require_begun()
    reader = _DamageTolerantReader()
    config = reader.read(run.config, lambda _: read_run_config(run))
    metrics = reader.read(run.metrics, read_metrics) or []
    holder = None if has_ended else run.holder()
    outcome = reader.read(run.gate, lambda _: read_sound_verdict(run))
    result = reader.read(run.result, read_result)
    record = RunRecord(
        run,
        describe_state(run, holder, None if outcome is None else outcome.word),
        read_start_time(run),
        count_steps(run, config),
        config=config,
        plan=read_plan(run.plan),
        metrics=metrics,
        seconds=cumulative_seconds(metrics),
        dataset=reader.read(run.dataset, _read_dataset),
        sample_answers=reader.read(run.sample_answers, read_sample_answers) or (),
        red_flags=() if result is None else result.red_flags,
        offered_step=read_offered_step(run),
        problems=tuple(reader.problems),
    )
    return record if outcome is None else _with_verdict(record, reader)


def _with_verdict(record: RunRecord, reader: _DamageTolerantReader) -> RunRecord:
    """The record with what the gate wrote, where that is still as it was judged."""
    run = record.run
    judged = reader.read(run.manifest, lambda _: read_manifest(run.path)["files"]) or {}
    changed = set()
    for path in (run.metrics, run.gate_losses, run.answers):
        entry = judged.get(path.name)
        if entry is not None and not reader.read(path, partial(matches_entry, entry=entry)):
            reader.problems.append(f"{path} has changed since the verdict was given.")
            changed.add(path)
    verdict = reader.read(run.gate, read_verdict)
    losses = None
    if run.gate_losses not in changed:
        losses = reader.read(run.gate_losses, read_example_losses)
    answers: Sequence[AnswerRecord] = ()
    if run.answers not in changed:
        answers = reader.read(run.answers, read_answers) or ()
    return replace(
        record,
        verdict=verdict,
        losses=losses,
        answers=answers,
        offered_step=record.offered_step if verdict is None else verdict.adapter_step,
        problems=tuple(reader.problems),
    )


def _read_dataset(path: Path) -> DatasetReport:
    try:
        return DatasetReport.from_json(read_json(path, None))
    except ValidationError as error:
        raise NestedTuneError(
            f"{path} is no report on a data set ({describe_first_problem(error)})."
        ) from error
