"""Where a run stands, from its folder alone: its state, its last losses and its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nested_core.config.resume import read_run_config
from nested_core.errors import ConfigError, DamagedError
from nested_core.report.run_figures import (
    RunFigures,
    gate_loss_of,
    has_broken_answers,
    is_quality_measured,
    read_offered_step,
)
from nested_core.storage.checkpoint_verification import list_checkpoints, newest_sound_checkpoint
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.loss_conclusion import describe_passed
from nested_core.training.metrics_file import read_latest_values, read_loss_records

State = Literal["running", "verified", "rejected", "trained", "resumable", "never began"]


def read_status(run: RunDirectory) -> dict[str, Any]:
    """The state of a run, its last losses, and the verdict if there is one."""
    config = read_run_config(run)
    latest = read_latest_values(run.metrics)
    gate, holder = _read_sound_gate(run), run.holder()
    verdict = None if gate is None else str(gate["verdict"])
    state = describe_state(run, holder, verdict)
    figures = RunFigures.from_records(
        read_loss_records(run.metrics), read_offered_step(run, gate), gate_loss_of(gate)
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
        "verdict": verdict,
        "reasons": _list_reasons(gate),
        "quality_measured": is_quality_measured(gate),
        "answers_broken": has_broken_answers(gate),
        "conclusion": None if gate is None else (gate.get("validation") or {}).get("conclusion"),
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


def read_sound_verdict(run: RunDirectory) -> str | None:
    """What the gate said, "passed" or "failed"; a run that is made longer takes it away.

    None without one. Raises DamagedError if it has changed since it was given.
    """
    gate = _read_sound_gate(run)
    return None if gate is None else str(gate["verdict"])


def _read_sound_gate(run: RunDirectory) -> dict[str, Any] | None:
    """The content of gate.json.

    None for a gate.json without its manifest: it was being written, or is an earlier version's.
    Raises DamagedError if it has changed since.
    """
    if not run.gate.exists():
        return None
    from nested_core.registry.gate_file import (  # brings mlx
        has_verdict_manifest,
        read_gate,
        require_verdict_manifest,
    )

    try:
        gate = read_gate(run.gate)
        require_verdict_manifest(run.path, gate)
    except (ConfigError, DamagedError):
        if run.gate.exists() and has_verdict_manifest(run.path):
            raise
        return None
    return gate


def _list_reasons(gate: dict[str, Any] | None) -> list[str]:
    if gate is None:
        return []
    from nested_core.registry.gate_file import reason_names  # brings mlx

    return reason_names(gate)


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
