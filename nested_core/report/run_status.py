"""Where a run stands, from its folder alone: its state, its last losses and its verdict."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import NestedTuneError
from nested_core.records.result import read_result
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import has_verdict_manifest, read_bound_verdict
from nested_core.storage.checkpoint_verification import list_checkpoints, newest_sound_checkpoint
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import read_json_object
from nested_core.text.loss_conclusion import describe_passed
from nested_core.training.reports.metrics_file import read_latest_values, read_loss_records
from nested_core.training.reports.training_plan import StepLoss, TrainingPlan, read_plan

State = Literal["running", "verified", "rejected", "trained", "resumable", "never began"]

_RUN_NAME_PATTERN = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{8}")


def read_status(run: RunDirectory) -> dict[str, Any]:
    """The state of a run, its last losses, and the verdict if there is one."""
    config = read_run_config(run)
    latest = read_latest_values(run.metrics)
    verdict, holder = read_sound_verdict(run), run.holder()
    validation = None if verdict is None else verdict.validation
    state = describe_state(run, holder, None if verdict is None else verdict.word)
    figures = RunFigures.from_records(
        read_loss_records(run.metrics),
        read_offered_step(run) if verdict is None else verdict.adapter_step,
        None if validation is None else validation.loss_after,
    )
    train_loss, val_loss = figures.last_train_loss, figures.last_val_loss
    return {
        "run_dir": str(run.path),
        "state": state,
        "process": holder,
        "step": latest.get("step", 0),
        "iteration": latest.get("iteration", 0),
        "iterations": config.iters if config.training.epochs is None else None,
        **figures.leading_to_json(),
        "current_train_loss": None if train_loss is None else train_loss[1],
        "current_val_loss": None if val_loss is None else val_loss[1],
        "not_finite": figures.not_finite(
            {"last_train_loss": "current_train_loss", "last_val_loss": "current_val_loss"}
        ),
        "learning_rate": latest.get("learning_rate"),
        "updates": latest.get("updates"),
        "checkpoint": _name_resume_checkpoint(run, state),
        "verdict": None if verdict is None else verdict.word,
        "reasons": [] if verdict is None else verdict.reason_names,
        "quality_measured": verdict is not None and verdict.is_measured,
        "answers_broken": verdict is not None and verdict.has_broken_answers,
        "conclusion": None if validation is None else validation.conclusion,
    }


def describe_status_verdict(status: Mapping[str, Any]) -> str | None:
    """The verdict of a status in words: `passed, better`, `failed: drift`; None without one."""
    if status["verdict"] == "passed":
        return describe_passed(
            status["conclusion"],
            is_measured=status["quality_measured"],
            is_broken=status["answers_broken"],
        )
    because = ", ".join(status["reasons"])
    return f"{status['verdict']}: {because}" if because else status["verdict"]


def read_sound_verdict(run: RunDirectory) -> Verdict | None:
    """What the gate said of a run; one that is made longer takes it away.

    None without one, and for a gate.json without its manifest, which is being written. Raises
    DamagedError if it has changed since it was given.
    """
    if not run.gate.exists():
        return None
    try:
        return read_bound_verdict(run.path)
    except NestedTuneError:
        if run.gate.exists() and has_verdict_manifest(run.path):
            raise
        return None


def describe_state(run: RunDirectory, holder: int | None, verdict: str | None) -> State:
    """The state of a run that the process `holder` works on, if one does."""
    if holder is not None:
        return "running"
    if verdict is not None:
        return "verified" if verdict == "passed" else "rejected"
    if run.result.exists():
        return "trained"
    return "resumable" if run.has_begun_training() else "never began"


def _name_resume_checkpoint(run: RunDirectory, state: str) -> str | None:
    """The checkpoint that the run would go on from: hashed if it is to be, else the newest."""
    if state == "resumable":
        path = newest_sound_checkpoint(run.checkpoints)
    else:
        path = next(reversed(list_checkpoints(run.checkpoints)), None)
    return None if path is None else path.name


def last_value(records: Sequence[dict[str, Any]], key: str) -> Any:
    """The last value of a key that is not null, or None."""
    return next((r[key] for r in reversed(records) if r.get(key) is not None), None)


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
        return read_result(run.result).adapter_step
    except (NestedTuneError, OSError):
        return None


def describe_length(step: int, steps: int | None, plan: TrainingPlan | None) -> str:
    """What was trained: "200 of 200 steps, 20 passes over train.jsonl"."""
    text = f"{step:,} steps" if steps is None else f"{step:,} of {steps:,} steps"
    passes = None if plan is None else plan.passes_until(step)
    if plan is None or passes is None:
        return text
    noun = "pass" if f"{passes:.3g}" == "1" else "passes"
    return f"{text}, {passes:.3g} {noun} over {plan.training_file}"


def count_steps(run: RunDirectory, config: FineTuneConfig | None) -> int | None:
    """The optimizer steps that a run is to take, from its plan, or before it from `iters`.

    None where epochs decide and nothing was counted yet.
    """
    plan = read_plan(run.plan)
    if plan is not None:
        return plan.steps
    if config is None or config.training.epochs is not None:
        return None
    per_step = config.grad_accumulation_steps
    is_rounded_down = config.training.reference is not None
    return config.iters // per_step if is_rounded_down else -(-config.iters // per_step)


def read_start_time(run: RunDirectory) -> datetime:
    """When a run began: its name says so, else the oldest of its files."""
    named = _RUN_NAME_PATTERN.fullmatch(run.path.resolve().name)
    if named is not None:
        with suppress(ValueError):  # digits that are no moment
            return datetime.strptime(named[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    times = []
    for path in run.path.iterdir():
        with suppress(FileNotFoundError):  # a temporary file of a run that is going on
            times.append(path.lstat().st_mtime)
    return datetime.fromtimestamp(min(times, default=0.0), UTC)


def describe_outcome(run: RunDirectory, config: FineTuneConfig, status: dict[str, Any]) -> str:
    """`promoted`, `rejected: loss_regressed`, `failed: data`, or the state of a run under way.

    `status` is what `read_status` says of the run. What a registry says counts where it is there.
    """
    if status["state"] == "running":
        return "running"
    if status["verdict"] == "failed":
        return f"rejected: {status['reasons'][0]}"
    if status["verdict"] == "passed":
        return _describe_publication(run, config)
    if status["state"] != "never began" or not run.dataset.exists():
        return str(status["state"])
    if read_json_object(run.dataset).get("counts", {}).get("error"):
        return "failed: data"
    is_continual = config.continual.start is not None and config.continual.skip_unchanged
    return "skipped" if is_continual else "never began"


def measure_minutes(run: RunDirectory) -> float | None:
    """From the run's configuration to the last that training or gate wrote; None before that."""
    written = [run.gate, run.result, run.metrics, run.dataset]
    try:
        begun = run.config.stat().st_mtime
        ended = max((path.stat().st_mtime for path in written if path.exists()), default=begun)
    except OSError:
        return None
    return max(0.0, ended - begun) / 60


def _describe_publication(run: RunDirectory, config: FineTuneConfig) -> str:
    """What the registry says of the version that a run made; "verified" without a registry."""
    from nested_core.records.verdict_file import read_verdict
    from nested_core.registry import history, list_versions  # brings mlx
    from nested_core.registry.folders import name_exists

    section = config.registry
    if section.path is None or section.name is None:
        return "verified"
    registry, name = Path(section.path), section.name
    try:
        if not name_exists(registry, name):
            return "verified"
        version = read_verdict(run.gate).trained.digest
        actions = [line["action"] for line in history(registry, name) if line["version"] == version]
        is_registered = version in list_versions(registry, name)
    except (NestedTuneError, OSError):  # `audit` says what is wrong with a registry
        return "verified"
    if "promote" in actions:
        return "promoted"
    if "declined" in actions:
        return "declined"
    return "verified" if is_registered or actions else "kept the champion"
