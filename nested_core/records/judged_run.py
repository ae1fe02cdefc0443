"""A run that was judged: what the gate had in hand, and the registry and its pages need.

`steps.judge` hands it on to the registration; after a restart, and for `nested-tune promote`, the
same is read from the run's folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
    """How a run was trained.

    schedule: steps, planned steps, epochs and file, as provenance.json has them; None for a run
        without a plan.
    replayed_tokens: how many supervised tokens of earlier data it was trained on.
    seconds: how long it took, without evaluations and pauses.
    """

    schedule: dict[str, Any] | None
    replayed_tokens: int
    seconds: float

    @classmethod
    def read(cls, run: RunDirectory) -> TrainingRecord:
        """What metrics.jsonl and plan.json say, each read once."""
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
    """A run, the verdict on it, and the adapter that the verdict was given on, in memory.

    What is not in hand yet is read from the folder when it is first asked for, and kept.
    """

    folder: RunDirectory
    bound: BoundVerdict
    adapter: Adapter

    @property
    def verdict(self) -> Verdict:
        """The verdict, as gate.json has it."""
        return self.bound.verdict

    @property
    def version(self) -> str:
        """The digest of the adapter, which is that of the version."""
        return self.verdict.trained.digest

    @property
    def base_fingerprint(self) -> str | None:
        """The fingerprint of its base model, as the adapter has it."""
        return self.adapter.config.get("base_fingerprint")

    @cached_property
    def dataset(self) -> DatasetReport:
        """The report on the data that it was trained on."""
        return read_dataset_record(self.folder.dataset)

    @cached_property
    def training(self) -> TrainingRecord:
        """How it was trained."""
        return TrainingRecord.read(self.folder)

    @cached_property
    def metrics_sha256(self) -> str | None:
        """What tells its training from others: see `hash_metrics`."""
        return hash_metrics(self.folder)


def hash_metrics(run: RunDirectory) -> str | None:
    """The hash of metrics.jsonl: its times tell a training from another that computed the same.

    It is that of the run wherever its folder lies, and after it is judged again.
    """
    return regular_sha256(run.metrics) if run.metrics.is_file() else None


def read_judged_run(run_dir: Path) -> JudgedRun:
    """A finished run whose verdict passed the adapter that the run offers.

    Raises ConfigError without a verdict, GateRejected for one that is not "passed", DamagedError
    where adapter and verdict do not agree.
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
    """A run with any verdict; of the adapter, which may be unsound, the configuration alone."""
    run = RunDirectory(run_dir)
    settings = read_adapter_config(run.adapter / CONFIG_NAME)
    return JudgedRun(run, bind_verdict(run_dir), Adapter(run.adapter, settings, {}))
