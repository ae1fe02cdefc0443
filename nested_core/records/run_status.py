"""A run as status, lists and pages look at it: each file is read once, when first asked for.

Damage is collected as errors, and the other files are read all the same. Code that must fail on a
damaged file calls that file's own reader in the module beside this one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nested_core import seams
from nested_core.config.key_properties import settings_that_make_loss
from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError, DamagedError, NestedTuneError
from nested_core.records.answers import (
    AnswerRecord,
    SampleAnswers,
    read_answers,
    read_sample_answers,
)
from nested_core.records.dataset import DatasetReport, held_out_split, read_dataset_record
from nested_core.records.metrics import cumulative_seconds, read_metrics
from nested_core.records.plan import StepLoss, TrainingPlan, describe_last_losses, read_plan
from nested_core.records.promoted_to import read_promoted_to
from nested_core.records.result import TrainResult, read_result
from nested_core.records.skip import Skip, read_skip
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import bind_verdict, has_verdict_manifest
from nested_core.storage.checkpoint_verification import (
    checkpoint_step,
    list_checkpoints,
    newest_sound_checkpoint,
)
from nested_core.storage.manifest import matches_entry, read_manifest
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import file_type
from nested_core.text.svg_chart import Point
from nested_core.text.value_format import format_count, format_passes

if TYPE_CHECKING:
    from nested_core.records.losses import ExampleLosses

State = Literal["running", "verified", "rejected", "trained", "resumable", "never began", "damaged"]
Content = TypeVar("Content")

_RUN_NAME_PATTERN = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{8}")
_LAST_LOSSES = {"train_loss": "loss", "val_loss": "val_loss"}  # by the names of metrics.jsonl


@dataclass(eq=False, repr=False)
class Run:
    """A run at one moment; each file's content is None or empty if it is missing or damaged.

    has_ended: true if the training process itself asks after it has finished, so it is not
        "running".
    errors: one error for each damaged file among those that were read so far.
    """

    folder: RunDirectory
    has_ended: bool = False
    errors: list[NestedTuneError] = field(default_factory=list)

    def __repr__(self) -> str:
        """Show folder, state and step."""
        return f"Run({self.folder.path}, {self.state}, step {self.step})"

    @property
    def path(self) -> Path:
        """The run's folder, as it was given."""
        return self.folder.path

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.path.resolve().name

    @property
    def problems(self) -> list[str]:
        """A message for each damaged file among those that were read so far."""
        return [str(error) for error in self.errors]

    def read_all(self) -> Run:
        """Read every file of the run, so that `problems` is complete, and return the run.

        Files that the verdict rests on are also compared with the hashes in the manifest.
        """
        if self.verdict is not None:
            self._is_as_judged(self.folder.metrics)
        for name in ("config", "metrics", "dataset", "skip", "result", "losses", "answers"):
            getattr(self, name)
        _ = self.sample_answers
        return self

    def read(self, path: Path, reader: Callable[[Path], Content]) -> Content | None:
        """Apply `reader` to a file.

        Returns None if the file is missing or damaged, which adds to `errors`.
        """
        if file_type(path) == "missing":
            return None
        try:
            return reader(path)
        except NestedTuneError as error:
            self.errors.append(error)
        except OSError as error:
            self.errors.append(DamagedError(f"{path} cannot be read: {error.strerror}."))
        return None

    def _is_as_judged(self, path: Path) -> bool:
        """Return whether a file is unchanged since the verdict.

        A changed one is added to `errors`.
        """
        if self.verdict is None:
            return False
        entry = self._judged_files.get(path.name)
        if entry is None or self.read(path, lambda file: matches_entry(file, entry)):
            return True
        self.errors.append(DamagedError(f"{path} has changed since the verdict was given."))
        return False

    @cached_property
    def _judged_files(self) -> Mapping[str, object]:
        """Size and hash of each file that the verdict rests on, by name.

        Empty without a manifest.
        """
        return self.read(self.folder.manifest, lambda _: read_manifest(self.path)["files"]) or {}

    @cached_property
    def config(self) -> FineTuneConfig | None:
        """The configuration of the run, from config.yaml."""
        return self.read(self.folder.config, lambda _: read_run_config(self.folder))

    @cached_property
    def plan(self) -> TrainingPlan | None:
        """How long the run is and what it is evaluated on, from plan.json."""
        return read_plan(self.folder.plan)

    @cached_property
    def dataset(self) -> DatasetReport | None:
        """The report on the run's data set, from dataset.json."""
        return self.read(self.folder.dataset, read_dataset_record)

    @cached_property
    def skip(self) -> Skip | None:
        """Why the run trained nothing, from skipped.json; None if it trained."""
        return self.read(self.folder.skipped, read_skip)

    @cached_property
    def metrics(self) -> Sequence[dict[str, Any]]:
        """The reports of the run in order, from metrics.jsonl."""
        return self.read(self.folder.metrics, read_metrics) or ()

    @cached_property
    def result(self) -> TrainResult | None:
        """What training ended with, from result.json."""
        return self.read(self.folder.result, read_result)

    @property
    def verdict(self) -> Verdict | None:
        """The gate's verdict; None before it is complete, and after the run is extended."""
        return self._verdict_or_damage[0]

    @cached_property
    def _verdict_or_damage(self) -> tuple[Verdict | None, bool]:
        """The gate's verdict or None, and whether gate.json exists and is damaged."""
        if not has_verdict_manifest(self.path):
            return None, False
        known = len(self.errors)
        verdict = self.read(self.folder.gate, lambda _: bind_verdict(self.path).verdict)
        if not (self.folder.gate.exists() and has_verdict_manifest(self.path)):
            del self.errors[known:]  # it was taken away meanwhile
        return verdict, len(self.errors) > known

    @cached_property
    def version(self) -> str | None:
        """The digest of the offered adapter, its name in a registry; None without an adapter.

        It comes from the verdict if there is one, else it is computed from the adapter's files.
        """
        if self.verdict is not None:
            return self.verdict.trained.digest
        from nested_core.storage.adapter import read_adapter  # numpy

        return self.read(self.folder.adapter, lambda path: read_adapter(path).digest())

    @cached_property
    def promoted_to(self) -> tuple[tuple[str, str], ...] | None:
        """Registries that the run was promoted to by hand and its configuration does not name."""
        path = self.folder.promoted_to
        return () if file_type(path) == "missing" else self.read(path, read_promoted_to)

    @property
    def configured_registry(self) -> tuple[Path, str] | None:
        """The registry and the name in it that config.yaml names; None if it names none."""
        return None if self.config is None else self.config.registry.location

    @property
    def registered_as(self) -> tuple[Path, str] | None:
        """The registry and the name in it that config.yaml names, else the last one promoted to.

        Returns None if the run has neither.
        """
        by_hand = [(Path(registry), name) for registry, name in self.promoted_to or ()]
        return self.configured_registry or next(reversed(by_hand), None)

    @cached_property
    def losses(self) -> ExampleLosses | None:
        """The loss of each held-out example; None if the file changed since the verdict."""
        from nested_core.records.losses import read_example_losses  # numpy

        path = self.folder.gate_losses
        return self.read(path, read_example_losses) if self._is_as_judged(path) else None

    @cached_property
    def answers(self) -> Sequence[AnswerRecord]:
        """The models' answers to the suites; empty if the file changed since the verdict."""
        path = self.folder.answers
        return (self.read(path, read_answers) if self._is_as_judged(path) else None) or ()

    @cached_property
    def sample_answers(self) -> Sequence[SampleAnswers]:
        """What base and trained adapter answered to the sample prompts."""
        return self.read(self.folder.sample_answers, read_sample_answers) or ()

    @cached_property
    def process(self) -> int | None:
        """The id of the process that trains this run now; None if no process does."""
        return None if self.has_ended else self.folder.holder()

    @cached_property
    def state(self) -> State:
        """What the run is doing: running, ended with a verdict, resumable or damaged."""
        if self.process is not None:
            return "running"
        if self.verdict is not None:
            return "verified" if self.verdict.has_passed else "rejected"
        if self.config is None or self._verdict_or_damage[1]:
            return "damaged"
        if self.folder.result.exists():
            return "trained"
        return "resumable" if self.folder.has_begun_training() else "never began"

    @cached_property
    def started(self) -> datetime:
        """When the run began: the time in its name, else that of its oldest file."""
        named = _RUN_NAME_PATTERN.fullmatch(self.name)
        if named is not None:
            with suppress(ValueError):  # digits that are no moment
                return datetime.strptime(named[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        times = []
        with suppress(PermissionError):  # of another user
            for path in self.path.iterdir():
                with suppress(FileNotFoundError):  # a temporary file of a run that is going on
                    times.append(path.lstat().st_mtime)
        return datetime.fromtimestamp(min(times, default=0.0), UTC)

    @property
    def minutes(self) -> float | None:
        """Minutes from writing the configuration to the newest file of training or gate.

        None if the configuration does not exist.
        """
        folder = self.folder
        written = [folder.gate, folder.result, folder.metrics, folder.dataset]
        try:
            begun = folder.config.stat().st_mtime
            ended = max((path.stat().st_mtime for path in written if path.exists()), default=begun)
        except OSError:
            return None
        return max(0.0, ended - begun) / 60

    @cached_property
    def seconds(self) -> Sequence[float]:
        """Seconds spent in training steps up to each report."""
        return cumulative_seconds(self.metrics)

    def last(self, key: str) -> Any:
        """Return the last reported value of a metric that is not null.

        Returns None if there is no such value.
        """
        return next((r[key] for r in reversed(self.metrics) if r.get(key) is not None), None)

    def last_loss(self, key: str) -> StepLoss | None:
        """Return step and value of the last `train_loss` or `val_loss`.

        The value None is not finite.

        Returns None if the loss was never reported.
        """
        name = _LAST_LOSSES[key]
        reports = ((r.get("step", 0), r[name]) for r in reversed(self.metrics) if name in r)
        return next(reports, None)

    @property
    def loss_unit(self) -> str:
        """The unit of its losses; nats/token where its configuration is missing or damaged."""
        return seams.unit_of_loss(None if self.config is None else self.config.training.loss)

    def describe_last_losses(self) -> dict[str, str]:
        """Describe the last training and validation loss with their data and step, by name."""
        return describe_last_losses(self.metrics, self.plan)

    def points(self, key: str, x: str = "step") -> list[Point]:
        """Return a metric's reports as points of a curve.

        x: `step`, or anything else for seconds of training.
        """
        positions = [r.get("step", 0) for r in self.metrics] if x == "step" else self.seconds
        return [
            Point(float(position), None if metrics[key] is None else float(metrics[key]))
            for position, metrics in zip(positions, self.metrics, strict=True)
            if key in metrics
        ]

    @cached_property
    def step(self) -> int:
        """The last optimizer step that was reported or saved; 0 before the first report."""
        saved = self.read(self.folder.checkpoints, list_checkpoints) or []
        return max([int(self.last("step") or 0), *map(checkpoint_step, saved)])

    @cached_property
    def steps(self) -> int | None:
        """The number of optimizer steps of the whole run.

        None if epochs decide it and are not counted yet.
        """
        if self.plan is not None:
            return self.plan.steps
        config = self.config
        if config is None or config.training.epochs is not None:
            return None
        per_step = config.grad_accumulation_steps
        is_rounded_down = config.training.reference is not None
        return config.iters // per_step if is_rounded_down else -(-config.iters // per_step)

    def describe_length(self) -> str:
        """Describe how much was trained: "200 of 200 steps, 20 passes over train.jsonl"."""
        text = format_count(self.step if self.steps is None else self.steps, "step")
        text = text if self.steps is None else f"{self.step:,} of {text}"
        if self.plan is None:
            return text
        passes = format_passes(self.plan.passes_until(self.step))
        return f"{text}, {passes} over {self.plan.training_file}"

    @property
    def offered_step(self) -> int | None:
        """The step whose adapter the run offers; None before training has ended."""
        if self.verdict is not None:
            return self.verdict.adapter_step
        return None if self.result is None else self.result.adapter_step

    @property
    def offered_val_loss(self) -> float | None:
        """The validation loss at the offered step; None if not measured or not finite."""
        at_step = (r for r in reversed(self.metrics) if r.get("step") == self.offered_step)
        return next((r["val_loss"] for r in at_step if "val_loss" in r), None)

    @property
    def gate_loss(self) -> float | None:
        """The offered adapter's loss on the gate's held-out examples; None if not measured."""
        validation = None if self.verdict is None else self.verdict.validation
        return None if validation is None else validation.loss_after

    @property
    def loss_to_champion(self) -> float | None:
        """The offered adapter's loss minus the champion's on the same examples.

        None if they were not compared.
        """
        champion = None if self.verdict is None else self.verdict.champion
        return None if champion is None else champion.difference

    @property
    def held_out_digest(self) -> str | None:
        """The digest of the examples that the gate measures losses on.

        None if dataset.json or config.yaml is damaged, or the examples are outside of the data set.
        """
        if self.dataset is None or self.config is None:
            return None
        split = held_out_split(self.config.gate.held_out, self.dataset.splits)
        return None if split is None else self.dataset.splits[split].digest

    @cached_property
    def loss_made_of(self) -> dict[str, object] | None:
        """What makes the loss of a row what it is: settings, tokenizer and base model, by name.

        None if config.yaml, dataset.json or the initial adapter's configuration is not there.
        """
        from nested_core.storage.adapter import CONFIG_NAME, read_adapter_config  # mlx

        adapter = self.read(self.folder.initial / CONFIG_NAME, read_adapter_config)
        if self.dataset is None or self.config is None or adapter is None:
            return None
        base = adapter.get("base_fingerprint")
        made_of = {"tokenizer": self.dataset.tokenizer, "base model": base}
        values = self.config.model_dump(mode="json")
        return settings_that_make_loss(FineTuneConfig, values) | made_of

    def find_checkpoint(self) -> str | None:
        """Return the name of the checkpoint to resume from; None if there is no sound one.

        In a run that is not resumable the newest checkpoint is named, without verifying its hashes.
        """
        path = next(reversed(list_checkpoints(self.folder.checkpoints)), None)
        if self.state == "resumable":
            path = newest_sound_checkpoint(self.folder.checkpoints)
        return None if path is None else path.name

    def to_json(self) -> dict[str, Any]:
        """Return what `status`, `runs` and `compare` print with `--json`; losses in `loss_unit`.

        A figure that the run does not have (yet) is None. A last loss that was not finite is None
        too, and named in `not_finite`. "offered" is the step whose adapter the run offers as its
        result, which need not be the last one.
        """
        config, verdict = self.config, self.verdict
        # By name the step and value of the last report; None if there is none
        lasts = {name: self.last_loss(name) for name in _LAST_LOSSES}
        validation = None if verdict is None else verdict.validation
        has_iterations = config is not None and config.training.epochs is None
        values = {
            "path": str(self.path),
            "state": self.state,
            "process": self.process,
            "started": self.started.isoformat(timespec="seconds"),
            "minutes": self.minutes,
            "adapter": None if self.registered_as is None else self.registered_as[1],
            "step": self.step,
            "steps": self.steps,
            "epochs": None if self.plan is None else self.plan.passes_until(self.step),
            "iteration": self.last("iteration") or 0,
            "iterations": config.iters if config is not None and has_iterations else None,
            "offered_step": self.offered_step,
            "offered_val_loss": self.offered_val_loss,
            "gate_loss": self.gate_loss,
            "loss_unit": self.loss_unit,
            **{name: None if last is None else last[1] for name, last in lasts.items()},
            "not_finite": [n for n, last in lasts.items() if last is not None and last[1] is None],
            "learning_rate": self.last("learning_rate"),
            "updates": self.last("updates"),
            "verdict": None if verdict is None else verdict.word,
            "reasons": [] if verdict is None else verdict.reason_names,
            "conclusion": None if validation is None else validation.conclusion,
            "quality_measured": verdict is not None and verdict.is_measured,
            "answers_broken": verdict is not None and bool(verdict.broken_answers),
        }
        return values | {"problem": next(iter(self.problems), None), "problems": self.problems}


def read_run(folder: RunDirectory, *, has_ended: bool = False) -> Run:
    """Read all files of a run; raise ConfigError if `folder` is not a run directory."""
    folder.require_begun()
    return Run(folder, has_ended).read_all()


def list_runs(folder: Path) -> list[Run]:
    """Return the runs in a folder, newest first; the folder itself too if it is a run.

    Other folders are skipped. Raises ConfigError if `folder` is not a folder.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder.absolute()} is not a folder. Give the one that holds your runs; without "
            f"--run-dir they go to runs/ in the folder that the command is given in."
        )
    runs = []
    for path in (folder, *folder.iterdir()):
        with suppress(PermissionError):  # another user's folder, which nobody else looks into
            if path.is_dir() and (run := RunDirectory(path)).has_run_files():
                runs.append(Run(run))
    return sorted(runs, key=lambda run: run.started, reverse=True)


@dataclass(frozen=True)
class AdapterRuns:
    """Selects the runs whose configuration names one adapter of one registry.

    registry: the registry's resolved folder.
    """

    registry: Path
    name: str

    @classmethod
    def of(cls, registry: Path, name: str) -> AdapterRuns:
        """Build the selection for a name in a registry, resolving the registry's path."""
        return cls(registry.resolve(), name)

    def are_named_by(self, location: tuple[Path, str] | None) -> bool:
        """Return whether a configured registry and name are this adapter's; None names none."""
        return location is not None and AdapterRuns.of(*location) == self

    def among(self, runs: Sequence[Run]) -> list[Run]:
        """Return those of the given runs that are of this adapter, in the given order.

        A run whose configuration cannot be read is of none.
        """
        return [run for run in runs if self.are_named_by(run.configured_registry)]
