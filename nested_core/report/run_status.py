"""Where a run stands, from its folder alone: its state, its last losses and its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nested_core.config.resume import read_run_config
from nested_core.errors import NestedTuneError
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import has_verdict_manifest, read_bound_verdict
from nested_core.report.run_figures import (
    RunFigures,
    read_offered_step,
)
from nested_core.storage.checkpoint_verification import list_checkpoints, newest_sound_checkpoint
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.loss_conclusion import describe_passed
from nested_core.training.reports.metrics_file import read_latest_values, read_loss_records

State = Literal["running", "verified", "rejected", "trained", "resumable", "never began"]


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
