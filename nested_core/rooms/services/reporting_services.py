"""The services of `report_to`, each by its own client.

Losses are sent as they come, then the verdict. What a service knows a run by is kept in
RUN_DIR/report-to.json, so that a resumed run goes on in the same place and the verdict is added
where the losses are. To add a service, write its class here and enter it in SERVICES.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError, DamagedError, shorten
from nested_core.pipeline.run_in_progress import RunInProgress
from nested_core.records.verdict_file import read_verdict
from nested_core.storage.json_file import JsonFile
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import read_regular
from nested_core.training.reports.training_callback import TrainingCallback

DEFAULT_PROJECT = "nested-tune"


class CallbackGroup:
    """Calls each of several callbacks in turn."""

    def __init__(self, callbacks: Sequence[TrainingCallback]) -> None:
        self._callbacks = tuple(callbacks)

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Pass a training report on."""
        for callback in self._callbacks:
            callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Pass an evaluation on."""
        for callback in self._callbacks:
            callback.on_val_loss_report(val_info)


class ReportingService(Protocol):
    """One service: a run of it is opened, or opened again by `run_id`, and closed."""

    run_id: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers of one iteration."""

    def attach(self, verdict: str, files: Iterable[Path]) -> None:
        """Add the verdict, and files for who looks at it."""

    def close(self) -> None:
        """Send what is held back, and end the run there."""


class _Client:
    """A service whose client, or the run that it gives, has `log` and `finish`."""

    run_id: str
    _run: Any

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _WeightsAndBiases(_Client):
    def __init__(self, project: str, folder: Path, settings: Any, run_id: str | None) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            config=settings,
            id=run_id,
            resume="allow",
        )
        self.run_id = str(self._run.id)

    def attach(self, verdict: str, files: Iterable[Path]) -> None:
        """The verdict in the run's summary, the files as one artifact."""
        self._run.summary["verdict"] = verdict
        artifact = self._wandb.Artifact(f"verdict-{self.run_id}", type="verdict")
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)


class _SwanLab(_Client):
    """It has no attachments: the files go as text, which is how it shows them."""

    def __init__(self, project: str, folder: Path, settings: Any, run_id: str | None) -> None:
        self._run = importlib.import_module("swanlab")
        self.run_id = run_id or secrets.token_hex(11)[:21]  # it takes 21 characters
        self._run.init(
            project=project,
            experiment_name=folder.name,
            logdir=str(folder / "swanlog"),
            config=settings,
            id=self.run_id,
            resume="allow",
        )

    def attach(self, verdict: str, files: Iterable[Path]) -> None:
        """The verdict and each file as a text."""
        texts = {"verdict": self._run.Text(verdict)} | {
            file.name: self._run.Text(read_regular(file).decode(), caption=file.name)
            for file in files
        }
        self._run.log(texts)


class _Trackio(_Client):
    """It goes on with a run of the same name."""

    def __init__(self, project: str, folder: Path, settings: Any, run_id: str | None) -> None:
        self._run = importlib.import_module("trackio")
        self.run_id = run_id or folder.name
        self._run.init(project=project, name=self.run_id, config=settings, resume="allow")

    def attach(self, verdict: str, files: Iterable[Path]) -> None:
        self._run.log({"verdict": verdict})
        for file in files:
            self._run.log_artifact(str(file), name=file.name, type="verdict")


class _Mlflow:
    def __init__(self, project: str, folder: Path, settings: Any, run_id: str | None) -> None:
        self._client: Any = importlib.import_module("mlflow").MlflowClient()
        if run_id is None:
            experiment = self._client.get_experiment_by_name(project)
            number = experiment.experiment_id if experiment else None
            number = number or self._client.create_experiment(project)
            run_id = self._client.create_run(number, run_name=folder.name).info.run_id
            self._client.log_dict(run_id, settings, "config.json")
        self.run_id = str(run_id)
        self._client.update_run(self.run_id, status="RUNNING")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self.run_id, name, value, step=step)

    def attach(self, verdict: str, files: Iterable[Path]) -> None:
        self._client.set_tag(self.run_id, "verdict", verdict)
        for file in files:
            self._client.log_artifact(self.run_id, str(file))

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


SERVICES: dict[str, Any] = {
    "wandb": _WeightsAndBiases,
    "swanlab": _SwanLab,
    "trackio": _Trackio,
    "mlflow": _Mlflow,
}


def configured_services(config: FineTuneConfig) -> list[str]:
    """The names in `report_to`, which is a list with commas, as in mlx-lm.

    Raises ConfigError for one that is not known or whose client is not installed.
    """
    names = [name.strip().lower() for name in (config.report_to or "").split(",")]
    names = [name for name in dict.fromkeys(names) if name]
    unknown = [name for name in names if name not in SERVICES]
    if unknown:
        raise ConfigError(
            f"report_to: {' and '.join(unknown)} is not known. Choose from {', '.join(SERVICES)}."
        )
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(missing)
        raise ConfigError(
            f"report_to: {' and '.join(missing)} is not installed. Install it (pip install "
            f"{packages}), or leave it out of report_to."
        )
    return names


class ReportingCallback:
    """Sends what a run reports to the services of `report_to`; a training callback.

    A service that fails is warned of once and is sent nothing more, but closed in the end: the run
    goes on without it.
    """

    def __init__(
        self, config: FineTuneConfig, run: RunDirectory, *, requires_all: bool = True
    ) -> None:
        """Raises ConfigError for a service that cannot be reached.

        Without `requires_all` it is left out, with a warning.
        """
        project = config.project_name or DEFAULT_PROJECT
        settings = config.model_dump(mode="json")
        self._run = run
        self._record = _read_service_record(run)
        self._services: dict[str, ReportingService] = {}
        self._failed: set[str] = set()
        for name in configured_services(config):
            known = self._record.run_ids.get(name)
            try:
                service = SERVICES[name](project, run.path.resolve(), settings, known)
            except Exception as error:  # of a client or of the way to its server
                if requires_all:
                    self.close()
                    raise ConfigError(f"report_to: {name} cannot be used: {error}") from error
                warnings.warn(f"report_to: {name} cannot be used: {error}", stacklevel=2)
                continue
            self._services[name] = service
            self._record.run_ids[name] = service.run_id
        if self._services:
            _SERVICE_RECORD_FILE.write(run.report_to, self._record)

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Send a training report."""
        self._log_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Send an evaluation."""
        self._log_report(val_info)

    def _log_report(self, info: Mapping[str, Any]) -> None:
        numbers = {
            name: float(value)
            for name, value in info.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        iteration = int(info["iteration"])
        for name, service in self._services.items():
            if name in self._failed:
                continue
            try:
                service.log(numbers, iteration)
            except Exception as error:  # of a client or of the way to its server
                self._failed.add(name)
                self._record.missing_from.setdefault(name, iteration)
                _SERVICE_RECORD_FILE.write(self._run.report_to, self._record)
                warnings.warn(
                    f"report_to: {name} took no report of iteration {iteration}, and is sent no "
                    f"more of this training, which goes on: {shorten(error, 200)}",
                    stacklevel=2,
                )
            else:
                # What a service lacked is sent anew where training goes on from before it.
                if iteration < self._record.missing_from.get(name, 0):
                    del self._record.missing_from[name]
                    _SERVICE_RECORD_FILE.write(self._run.report_to, self._record)

    def attach(self, verdict: str, files: Iterable[Path]) -> None:
        """Add the verdict and the files that are there; a service that refuses is warned of."""
        present = [file for file in files if file.is_file()]
        for name, service in self._services.items():
            try:
                service.attach(verdict, present)
            except Exception as error:  # of a client or of the way to its server
                message = f"report_to: the verdict was not attached: {name}: {error}"
                warnings.warn(message, stacklevel=2)

    def close(self) -> None:
        """Send what is held back; a service that cannot take it is warned of."""
        for name, service in self._services.items():
            try:
                service.close()
            except Exception as error:  # of a client or of the way to its server
                if name not in self._failed:
                    warnings.warn(f"report_to: {name} was not closed: {error}", stacklevel=2)


class Services:
    """The services of a configuration's `report_to`, for one fine-tune."""

    def __init__(self, config: FineTuneConfig) -> None:
        """Raises ConfigError for a service that is not known or whose client is not installed."""
        self._config = config
        self._has_any = bool(configured_services(config))

    @contextmanager
    def reporting(
        self, run: RunDirectory, callback: TrainingCallback | None
    ) -> Iterator[TrainingCallback | None]:
        """The caller's callback together with the services, for the block's training."""
        if not self._has_any:
            yield callback
            return
        services = ReportingCallback(self._config, run)
        try:
            yield services if callback is None else CallbackGroup([callback, services])
        finally:
            services.close()

    @contextmanager
    def attaching_verdict_at_end(self, run: RunDirectory) -> Iterator[None]:
        """When the block ends, add its verdict, gate.json and report.html to each service's run.

        A service that cannot be reached is warned of: the run is done without it. So is one that
        lacks reports of the training.
        """
        try:
            yield
        finally:
            if self._has_any:
                if run.result.is_file() and run.gate.is_file():
                    _attach_verdict(self._config, run)
                for name, iteration in _read_service_record(run).missing_from.items():
                    warnings.warn(
                        f"report_to: {name} lacks reports of this run, from iteration {iteration} "
                        f"on; all are in {run.metrics}",
                        stacklevel=2,
                    )


def attaching_verdict_of(work: RunInProgress) -> AbstractContextManager[None]:
    """Return the context that adds the verdict of a run to the services of its `report_to`."""
    return Services(work.config).attaching_verdict_at_end(work.run)


def _attach_verdict(config: FineTuneConfig, run: RunDirectory) -> None:
    try:
        services = ReportingCallback(config, run, requires_all=False)
        try:
            services.attach(read_verdict(run.gate).word, (run.gate, run.report))
        finally:
            services.close()
    except (ConfigError, DamagedError, KeyError, OSError) as error:
        warnings.warn(f"report_to: the verdict was not attached: {error}", stacklevel=2)


@dataclass(frozen=True)
class _ServiceRecord:
    """RUN_DIR/report-to.json, by service: its run's id, and the first iteration not sent to it."""

    run_ids: dict[str, str] = field(default_factory=dict)
    missing_from: dict[str, int] = field(default_factory=dict)


_SERVICE_RECORD_FILE = JsonFile(_ServiceRecord, None)


def _read_service_record(run: RunDirectory) -> _ServiceRecord:
    try:
        return _SERVICE_RECORD_FILE.read(run.report_to)
    except DamagedError:  # or a first process: then the services begin anew
        return _ServiceRecord()
