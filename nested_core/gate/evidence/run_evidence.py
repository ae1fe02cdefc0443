"""A run's files checked against the digests that training recorded; any difference is damage.

result.json names the offered checkpoint, and the checkpoint holds digests of the inputs of
training. A damaged run (exit code 6) never gets a verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from nested_core.errors import ConfigError, DamagedError, naming_damaged_file
from nested_core.optim.gradients import find_gradient_mark
from nested_core.optim.tier_assignment import TierMap, count_expected_updates
from nested_core.optim.tier_counters import COUNTERS_KEY, require_current_layout
from nested_core.optim.tiers_file import read_tiers
from nested_core.records.dataset import DatasetReport, read_dataset_record
from nested_core.records.result import read_result
from nested_core.records.verdict import TensorChange, TierChange
from nested_core.storage.adapter import ADAPTER_FILES, Adapter, read_adapter
from nested_core.storage.atomic import digest_json, render_json
from nested_core.storage.checkpoint import (
    MASTERS_PREFIX,
    OPTIMIZER_NAME,
    Checkpoint,
    read_checkpoint,
)
from nested_core.storage.checkpoint_verification import STATE_NAME, checkpoint_path
from nested_core.storage.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    describe_content,
    describe_file,
    read_manifest,
)
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import StoredTensor, read_tensors
from nested_core.storage.untrusted_files import regular_sha256


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
    """The fields of a checkpoint's state.json that the gate needs."""

    model_config = ConfigDict(strict=True)
    input_digests: dict[str, str] = Field(alias="found")
    tiers: list[TierUpdateCounts]
    flush_steps: list[int]
    logits: RecordedLogits


@dataclass(frozen=True)
class RunEvidence:
    """Both adapters of a run, the checkpoint that the trained one comes from, and its record.

    dataset: the report on the data that the adapter was trained on.
    files: a manifest entry for each file that was read, by its path in the run directory.
    last_step: the optimizer step that training ended with.
    """

    before: Adapter
    after: Adapter
    checkpoint: Checkpoint
    record: CheckpointEvidence
    dataset: DatasetReport
    files: dict[str, FileEntry]
    last_step: int


def digests_for_result(
    run: RunDirectory, offered_checkpoint: Path, manifest: Manifest | None = None
) -> dict[str, str]:
    """Return the digests that result.json records: of the offered checkpoint and what selected it.

    `manifest` is the checkpoint's manifest; it is read if None. The validation losses are included
    because the gate reads from them among how many steps the adapter was selected.
    """
    digests = {
        "checkpoint": str((manifest or read_manifest(offered_checkpoint))["digest"]),
        "metrics": regular_sha256(run.metrics),
    }
    if run.validation_losses.is_file():
        digests["validation_losses"] = regular_sha256(run.validation_losses)
    return digests


def collect_evidence(run: RunDirectory) -> RunEvidence:
    """Read a finished run's files for the gate, and verify that they belong together.

    The digests in result.json and in the offered checkpoint say what training read and wrote.
    Raises DamagedError if any of the files changed since.
    """
    result = read_result(run.result)
    offered = checkpoint_path(run.checkpoints, result.adapter_step)
    checkpoint = read_checkpoint(offered)
    with naming_damaged_file(offered / STATE_NAME):
        record = CheckpointEvidence.model_validate(checkpoint.state)
    if digests_for_result(run, offered, checkpoint.manifest) != result.evidence:
        raise DamagedError(
            f"{offered}, {run.metrics} or {run.validation_losses.name} beside it is not what "
            f"training wrote: result.json holds other digests. Bring back what was there, or train "
            f"again."
        )
    try:
        before, after = read_adapter(run.initial), read_adapter(run.adapter)
    except ConfigError as error:  # there is no such folder
        raise DamagedError(f"{error} Bring back what was there, or train again.") from error
    files = _hash_judged_files(run, checkpoint, before, after)
    dataset = read_dataset_record(run.dataset)
    _require_unchanged_inputs(run, record.input_digests, offered, files, dataset)
    _require_adapter_of_checkpoint(run, checkpoint, files)
    if before.digest() != record.input_digests.get("initial"):
        raise DamagedError(f"{run.initial} is not the adapter that {offered} was trained from.")
    return RunEvidence(before, after, checkpoint, record, dataset, files, result.step)


def _hash_judged_files(
    run: RunDirectory, offered: Checkpoint, *adapters: Adapter
) -> dict[str, FileEntry]:
    """Return size and SHA-256 of each file that the verdict rests on, by path in the run.

    The configuration is not among them.
    """
    paths = [run.dataset, run.tiers, run.plan, run.metrics, run.result]
    optional = (run.validation_losses, run.replay, run.replayed_rows, run.start)
    paths += [path for path in optional if path.is_file()]
    entries = {path: describe_file(path) for path in paths}
    entries[offered.path / MANIFEST_NAME] = describe_content(render_json(dict(offered.manifest)))
    for adapter in adapters:
        for name, content in adapter.files.items():
            entries[adapter.path / name] = describe_content(content)
    return {path.relative_to(run.path).as_posix(): entry for path, entry in entries.items()}


def _require_unchanged_inputs(
    run: RunDirectory,
    digests: dict[str, str],
    offered_checkpoint: Path,
    files: Mapping[str, FileEntry],
    dataset: DatasetReport,
) -> None:
    """Raise DamagedError if an input of training differs from its digest in the checkpoint.

    The inputs are the initial adapter, tiers, replayed examples, start and the report on the data.

    digests: those in the checkpoint that the run offers, by the input's name.
    files: size and hash of the run's files as they are now, by path in the run directory.
    """
    hashes = {name: files[f"{run.initial.name}/{name}"]["sha256"] for name in ADAPTER_FILES}
    if digest_json(hashes) != digests.get("initial_files"):
        raise DamagedError(
            f"{run.initial} is not the adapter that training began from: its digest has changed "
            f"since. Without the true initial adapter nothing can be proven. Train again."
        )
    if files[run.tiers.name]["sha256"] != digests.get("tiers"):
        raise DamagedError(f"{run.tiers} has changed since training began.")
    for name, path in (("replay", run.replay), ("start", run.start)):
        recorded = files[path.name]["sha256"] if path.name in files else None
        if recorded != digests.get(name):
            raise DamagedError(f"{path} has changed since training began.")
    if (dataset.digest, dataset.tokenizer) != (digests.get("data"), digests.get("tokenizer")):
        raise DamagedError(
            f"{run.dataset} is not the report on the data that {offered_checkpoint} has seen, or "
            f"is that of another tokenizer or chat template."
        )


def _require_adapter_of_checkpoint(
    run: RunDirectory, offered: Checkpoint, files: Mapping[str, FileEntry]
) -> None:
    """Raise DamagedError if the run's adapter differs from that in the offered checkpoint."""
    listed = offered.manifest["files"]
    for name in ADAPTER_FILES:
        if listed.get(name) != files[f"{run.adapter.name}/{name}"]:
            raise DamagedError(
                f"{run.adapter} is not the adapter of {offered.path}: it has changed since. "
                f"Copy {' and '.join(ADAPTER_FILES)} from the checkpoint back into it."
            )


@dataclass(frozen=True)
class TierEvidence:
    """What a checkpoint records of the tiers.

    tiers: the tier of each tensor, and the frequency of each tier.
    counts: applied and skipped updates of each tier.
    initial: the tensors of the initial adapter, by name.
    """

    tiers: TierMap
    step: int
    flush_steps: Sequence[int]
    counts: Sequence[TierUpdateCounts]
    optimizer_state: dict[str, StoredTensor]
    initial: dict[str, StoredTensor]

    @classmethod
    def collect(cls, run: RunDirectory, evidence: RunEvidence) -> TierEvidence:
        """Read the tiers from the run directory and from its verified checkpoint."""
        optimizer_state = read_tensors(evidence.checkpoint.path / OPTIMIZER_NAME)
        layout = optimizer_state.get(f"{COUNTERS_KEY}.layout")
        require_current_layout(None if layout is None else layout.to_mlx())
        return cls(
            read_tiers(run.tiers),
            evidence.checkpoint.step,
            evidence.record.flush_steps,
            evidence.record.tiers,
            optimizer_state,
            evidence.before.tensors,
        )

    def had_gradient(self, name: str) -> bool:
        """Whether an applied update of this parameter had a gradient that was not zero."""
        evidence = find_gradient_mark(self.optimizer_state, name)
        return evidence is not None and bool(np.frombuffer(evidence.data, np.uint8).any())

    def is_missing_its_updates(self, name: str) -> bool:
        """Whether a parameter that did not change had gradients, and no master that moved.

        A float32 master may move by less than the parameter's own, narrower dtype can represent.
        """
        master = self.optimizer_state.get(MASTERS_PREFIX + name)
        before = self.initial[name].to_numpy()
        has_moved = master is not None and not np.array_equal(master.to_numpy(), before)
        return self.had_gradient(name) and not has_moved


def tier_changes(evidence: TierEvidence, changes: Sequence[TensorChange]) -> list[TierChange]:
    """Return the rows of the tier table: changed tensors and update counts of each tier."""
    rows = []
    for tier, frequency in enumerate(evidence.tiers.frequencies):
        tensors = [change for change in changes if change.tier == tier]
        expected = count_expected_updates(evidence.step, frequency, evidence.flush_steps)
        counts = evidence.counts[tier]
        changed = sum(change.changed for change in tensors)
        updates, skipped = counts.updates, counts.skipped
        rows.append(TierChange(tier, frequency, len(tensors), changed, expected, updates, skipped))
    return rows
