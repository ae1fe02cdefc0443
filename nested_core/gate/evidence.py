"""A run's folder held to what training wrote: what differs is damage, and never gets a verdict.

The offered checkpoint says what training began from; result.json says which checkpoint that is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nested_core.config.loading import render_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DamagedError
from nested_core.storage.adapter import Adapter, files_sha256, read_adapter
from nested_core.storage.checkpoint import STATE_NAME, Checkpoint, checkpoint_path, read_checkpoint
from nested_core.storage.manifest import read_manifest
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import read_json, regular_sha256

MAX_RESULT_BYTES = 64 * 1024 * 1024
Model = TypeVar("Model", bound=BaseModel)


class Result(BaseModel):
    """What the gate needs of result.json."""

    model_config = ConfigDict(strict=True)
    adapter_step: int
    evidence: dict[str, str]


class Counts(BaseModel):
    """One tier's updates, as a checkpoint counts them."""

    model_config = ConfigDict(strict=True)
    updates: int = Field(ge=0)
    skipped: int = Field(ge=0)


class Logits(BaseModel):
    """What the trainer's own model said on fixed prompts; None is a number that is not finite."""

    model_config = ConfigDict(strict=True)
    prompts: list[list[int]]
    columns: list[int]
    values: list[list[float | None]]


class Record(BaseModel):
    """What the gate needs of a checkpoint's state.json."""

    model_config = ConfigDict(strict=True)
    found: dict[str, str]
    tiers: list[Counts]
    flush_steps: list[int]
    logits: Logits


@dataclass(frozen=True)
class Evidence:
    """Both adapters of a run, the checkpoint that the trained one comes from, and its record."""

    before: Adapter
    after: Adapter
    checkpoint: Checkpoint
    record: Record


def describe_evidence(run: RunDirectory, offered: Path) -> dict[str, str]:
    """What result.json keeps of the folder: digests of the offered checkpoint and the metrics."""
    return {
        "checkpoint": str(read_manifest(offered)["digest"]),
        "metrics": regular_sha256(run.metrics),
    }


def describe_judged(config: FineTuneConfig, run: RunDirectory) -> dict[str, str]:
    """What gate.json keeps of the run: SHA-256 of the files that the verdict rests on, by name.

    Of config.yaml it is that of the configuration that is judged under, whatever the file says by
    now. result.json holds the digests of all that is not listed.
    """
    judged_under = hashlib.sha256(render_config(config)).hexdigest()
    others = {path.name: regular_sha256(path) for path in (run.dataset, run.result)}
    return {run.config.name: judged_under} | others


def changed_since_judged(run: RunDirectory, recorded: Any) -> list[str]:
    """The files that are not, or not any more, those that gate.json recorded."""
    held = recorded if isinstance(recorded, dict) else {}
    paths = (run.config, run.dataset, run.result)
    return [path.name for path in paths if held.get(path.name) != regular_sha256(path)]


def collect_evidence(run: RunDirectory) -> Evidence:
    """Read a finished run; DamagedError where anything is not as training left it."""
    result = _checked(Result, read_json(run.result, MAX_RESULT_BYTES), run.result)
    path = checkpoint_path(run.checkpoints, result.adapter_step)
    checkpoint = read_checkpoint(path)
    record = _checked(Record, checkpoint.state, path / STATE_NAME)
    if describe_evidence(run, path) != result.evidence:
        raise DamagedError(
            f"{path} or {run.metrics} is not what training wrote: result.json holds other digests. "
            f"Bring back what was there, or train again."
        )
    _require_same_files(run, record.found, path)
    before, after = read_adapter(run.initial), read_adapter(run.adapter)
    if before.digest() != record.found.get("initial"):
        raise DamagedError(f"{run.initial} is not the adapter that {path} was trained from.")
    return Evidence(before, after, checkpoint, record)


def _checked(model: type[Model], value: Any, path: Path) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DamagedError(f"{path}: {where}: {first['msg']}.") from error


def _require_same_files(run: RunDirectory, found: dict[str, str], offered: Path) -> None:
    """What training began from and what it offered, byte for byte."""
    if files_sha256(run.initial) != found.get("initial_files"):
        raise DamagedError(
            f"{run.initial} is not the adapter that training began from: its digest has changed "
            f"since. Without the true initial adapter nothing can be proven; train again."
        )
    if regular_sha256(run.tiers) != found.get("tiers"):
        raise DamagedError(f"{run.tiers} has changed since training began.")
    dataset = read_json(run.dataset, MAX_RESULT_BYTES)
    if not isinstance(dataset, dict) or dataset.get("digest") != found.get("data"):
        raise DamagedError(f"{run.dataset} is not the report on the data that {offered} has seen.")
    if files_sha256(run.adapter) != files_sha256(offered):
        raise DamagedError(f"{run.adapter} is not the adapter of {offered}: it has changed since.")
