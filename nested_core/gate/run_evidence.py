"""A run's files checked against the digests that training recorded; any difference is damage.

result.json names the offered checkpoint, and the checkpoint holds digests of what training began
from. Damage (exit 6) never gets a verdict.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nested_core.config.loading import render_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DamagedError, describe_first_problem
from nested_core.storage.adapter import (
    ADAPTER_FILES,
    Adapter,
    combined_sha256,
    read_adapter,
)
from nested_core.storage.checkpoint import Checkpoint, read_checkpoint
from nested_core.storage.checkpoint_verification import STATE_NAME, checkpoint_path
from nested_core.storage.manifest import MANIFEST_NAME, FileEntry, describe_file, read_manifest
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.strict_files import read_json, regular_sha256

MAX_RESULT_BYTES = 64 * 1024 * 1024
Model = TypeVar("Model", bound=BaseModel)


class ResultRecord(BaseModel):
    """What the gate needs of result.json."""

    model_config = ConfigDict(strict=True)
    adapter_step: int
    step: int
    evidence: dict[str, str]


class TierUpdateCounts(BaseModel):
    """The number of updates of one tier, as a checkpoint records it."""

    model_config = ConfigDict(strict=True)
    updates: int = Field(ge=0)
    skipped: int = Field(ge=0)


class RecordedLogits(BaseModel):
    """The logits of the trainer's own model on fixed prompts; None if not finite."""

    model_config = ConfigDict(strict=True)
    prompts: list[list[int]]
    columns: list[int]
    values: list[list[float | None]]


class CheckpointEvidence(BaseModel):
    """What the gate needs of a checkpoint's state.json."""

    model_config = ConfigDict(strict=True)
    input_digests: dict[str, str] = Field(alias="found")
    tiers: list[TierUpdateCounts]
    flush_steps: list[int]
    logits: RecordedLogits


@dataclass(frozen=True)
class RunEvidence:
    """Both adapters of a run, the checkpoint that the trained one comes from, and its record.

    files: the entries of all that was read for a manifest, by their path in the run directory.
    last_step: the optimizer step that training ended with.
    """

    before: Adapter
    after: Adapter
    checkpoint: Checkpoint
    record: CheckpointEvidence
    files: dict[str, FileEntry]
    last_step: int


def digests_for_result(run: RunDirectory, offered_checkpoint: Path) -> dict[str, str]:
    """What result.json records of the run: digests of the offered checkpoint and of what chose it.

    Without the losses of the evaluated steps the gate would take the choice for one among one.
    """
    digests = {
        "checkpoint": str(read_manifest(offered_checkpoint)["digest"]),
        "metrics": regular_sha256(run.metrics),
    }
    if run.validation_losses.is_file():
        digests["validation_losses"] = regular_sha256(run.validation_losses)
    return digests


def collect_evidence(run: RunDirectory) -> RunEvidence:
    """Read a finished run; DamagedError if anything is not as training left it."""
    result = _parse_record(ResultRecord, read_json(run.result, MAX_RESULT_BYTES), run.result)
    offered = checkpoint_path(run.checkpoints, result.adapter_step)
    checkpoint = read_checkpoint(offered)
    record = _parse_record(CheckpointEvidence, checkpoint.state, offered / STATE_NAME)
    if digests_for_result(run, offered) != result.evidence:
        raise DamagedError(
            f"{offered}, {run.metrics} or {run.validation_losses.name} beside it is not what "
            f"training wrote: result.json holds other digests. Bring back what was there, or train "
            f"again."
        )
    files = _hash_judged_files(run, offered)
    _require_unchanged_inputs(run, record.input_digests, offered, files)
    _require_adapter_of_checkpoint(run, offered, files)
    before, after = read_adapter(run.initial), read_adapter(run.adapter)
    if before.digest() != record.input_digests.get("initial"):
        raise DamagedError(f"{run.initial} is not the adapter that {offered} was trained from.")
    return RunEvidence(before, after, checkpoint, record, files, result.step)


def _hash_judged_files(run: RunDirectory, offered_checkpoint: Path) -> dict[str, FileEntry]:
    """Size and SHA-256 of all that a verdict rests on but the configuration, by path in the run."""
    paths = [run.dataset, run.tiers, run.metrics, run.result, offered_checkpoint / MANIFEST_NAME]
    paths += [path for path in (run.validation_losses,) if path.is_file()]
    paths += [folder / name for folder in (run.initial, run.adapter) for name in ADAPTER_FILES]
    return {path.relative_to(run.path).as_posix(): describe_file(path) for path in paths}


def config_file_entry(config: FineTuneConfig) -> FileEntry:
    """The entry of config.yaml as it would hold this configuration, whatever the file says now."""
    content = render_config(config)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _parse_record(record_type: type[Model], value: Any, path: Path) -> Model:
    try:
        return record_type.model_validate(value)
    except ValidationError as error:
        raise DamagedError(f"{path}: {describe_first_problem(error)}.") from error


def _require_unchanged_inputs(
    run: RunDirectory,
    digests: dict[str, str],
    offered_checkpoint: Path,
    files: Mapping[str, FileEntry],
) -> None:
    """Compare what training began from with the digests in its checkpoint."""
    hashes = {name: files[f"{run.initial.name}/{name}"]["sha256"] for name in ADAPTER_FILES}
    if combined_sha256(hashes) != digests.get("initial_files"):
        raise DamagedError(
            f"{run.initial} is not the adapter that training began from: its digest has changed "
            f"since. Without the true initial adapter nothing can be proven; train again."
        )
    if files[run.tiers.name]["sha256"] != digests.get("tiers"):
        raise DamagedError(f"{run.tiers} has changed since training began.")
    dataset = read_json(run.dataset, None)  # as large as the number of findings made it
    if not isinstance(dataset, dict) or dataset.get("digest") != digests.get("data"):
        raise DamagedError(
            f"{run.dataset} is not the report on the data that {offered_checkpoint} has seen."
        )


def _require_adapter_of_checkpoint(
    run: RunDirectory, offered_checkpoint: Path, files: Mapping[str, FileEntry]
) -> None:
    """Compare the adapter with the checkpoint's manifest, against which its files were hashed."""
    listed = read_manifest(offered_checkpoint)["files"]
    for name in ADAPTER_FILES:
        if listed.get(name) != files[f"{run.adapter.name}/{name}"]:
            raise DamagedError(
                f"{run.adapter} is not the adapter of {offered_checkpoint}: it has changed since. "
                f"Copy {' and '.join(ADAPTER_FILES)} from the checkpoint back into it."
            )
