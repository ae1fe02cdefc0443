"""A finished run with its verdict and adapter, as the registry and its pages need it.

`steps.judge` passes it on in memory to the registration; after a restart, and for `nested-tune
promote`, the same is read from the run's folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nested_core.errors import DamagedError
from nested_core.records.dataset import DatasetReport, read_dataset_record
from nested_core.records.metrics import cumulative_seconds, latest_values, read_metrics
from nested_core.records.plan import read_plan
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import (
    GATE_NAME,
    BoundVerdict,
    bind_verdict,
    require_verdict_on_adapter,
)
from nested_core.storage.adapter import (
    ADAPTER_FILES,
    CONFIG_NAME,
    Adapter,
    read_adapter,
    read_adapter_config,
)
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import file_type, regular_sha256


@dataclass(frozen=True)
class TrainingRecord:
    """How long and on what a run was trained.

    schedule: steps, planned steps, epochs and training file, for provenance.json; None for a run
        without plan.json.
    replayed_tokens: how many supervised tokens of earlier versions' data were trained on.
    seconds: the time spent in training steps, without evaluations and pauses.
    """

    schedule: dict[str, object] | None
    replayed_tokens: int
    seconds: float

    @classmethod
    def read(cls, run: RunDirectory) -> TrainingRecord:
        """Read the record from the run's metrics.jsonl and plan.json."""
        records = read_metrics(run.metrics)
        latest = latest_values(records)
        steps = int(latest.get("step", 0))
        schedule = None
        if (plan := read_plan(run.plan)) is not None:
            schedule = {
                "steps": steps,
                "planned_steps": plan.steps,
                "epochs": plan.passes_until(steps),
                "file": plan.training_file,
            }
        seconds = max(cumulative_seconds(records), default=0.0)
        return cls(schedule, int(latest.get("replayed_tokens", 0)), seconds)


@dataclass(eq=False)
class JudgedRun:
    """A run with its verdict and the adapter that the verdict was given on, in memory.

    Its other files are read when first asked for, and cached.
    """

    folder: RunDirectory
    bound: BoundVerdict
    adapter: Adapter

    @property
    def verdict(self) -> Verdict:
        """The gate's verdict on the run's adapter."""
        return self.bound.verdict

    @property
    def version(self) -> str:
        """The adapter's digest, which is also the name of its version in a registry."""
        return self.verdict.trained.digest

    @property
    def base_fingerprint(self) -> str | None:
        """The base model's fingerprint in adapter_config.json; None if it is not recorded."""
        return self.adapter.config.get("base_fingerprint")

    @cached_property
    def dataset(self) -> DatasetReport:
        """The report on the data set that the run was trained on."""
        return read_dataset_record(self.folder.dataset)

    @cached_property
    def training(self) -> TrainingRecord:
        """How long and on what the run was trained."""
        return TrainingRecord.read(self.folder)

    @cached_property
    def metrics_sha256(self) -> str | None:
        """SHA-256 of metrics.jsonl, which identifies this training; None without the file."""
        return hash_metrics(self.folder)


def hash_metrics(run: RunDirectory) -> str | None:
    """Return the SHA-256 of metrics.jsonl, which identifies a training; None without the file.

    The file has times, so two trainings with equal results have different hashes. Moving the folder
    or judging the run again leaves the hash unchanged.
    """
    return regular_sha256(run.metrics) if run.metrics.is_file() else None


def read_judged_run(run_dir: Path) -> JudgedRun:
    """Read a finished run whose adapter passed the gate.

    Raises ConfigError without a verdict, GateRejected for a verdict that is not "passed", and
    DamagedError if the verdict is on another adapter or an adapter file is not a regular file.
    """
    run = RunDirectory(run_dir)
    bound = bind_verdict(run_dir, must_pass=True)
    for file in (run.adapter / name for name in ADAPTER_FILES):
        if file_type(file) not in ("file", "missing"):  # read_adapter says which file is missing
            raise DamagedError(
                f"{file} is not a regular file: a version is a copy of files that the run itself "
                "wrote."
            )
    adapter = read_adapter(run.adapter)
    require_verdict_on_adapter(bound.verdict, adapter.digest(), run_dir / GATE_NAME)
    return JudgedRun(run, bound, adapter)


def read_rejected_run(run_dir: Path) -> JudgedRun:
    """Read a run with any verdict, and of its adapter the configuration alone, without tensors."""
    run = RunDirectory(run_dir)
    settings = read_adapter_config(run.adapter / CONFIG_NAME)
    return JudgedRun(run, bind_verdict(run_dir), Adapter(run.adapter, settings, {}))
