"""The services of `report_to`, each by its own client.

Losses are sent as they come, then the verdict. A random id of the run is kept in
RUN_DIR/report-to.json, so that a resumed run goes on in the same place and the verdict is added
where the losses are. mlx-lm's own callbacks do neither.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError, DamagedError, shorten
from nested_core.pipeline.processes import ReportingServices
from nested_core.pipeline.run_in_progress import AroundRun
from nested_core.records.verdict_file import read_verdict
from nested_core.storage.json_file import JsonFile
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import read_regular
from nested_core.training.reports.training_callback import TrainingCallback

SERVICES = ("wandb", "swanlab", "trackio", "mlflow")


def configured_services(config: FineTuneConfig) -> list[str]:
    """Return the names in `report_to`, which is a list with commas, as in mlx-lm.

    Raises ConfigError for one that is not known or whose client is not installed.
    """
    names = [name.strip().lower() for name in (config.report_to or "").split(",")]
    names = [name for name in dict.fromkeys(names) if name]
    if unknown := [name for name in names if name not in SERVICES]:
        raise ConfigError(
            f"report_to: {' and '.join(unknown)} is not known. Choose from {', '.join(SERVICES)}."
        )
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"report_to: {' and '.join(missing)} is not installed. Install it (pip install "
            f"{' '.join(missing)}), or leave it out of report_to."
        )
    return names


class _WandbRun:
    """A run in wandb, or in swanlab or trackio, whose clients have wandb's functions."""

    def __init__(
        self, name: str, project: str, settings: dict[str, Any], folder: Path, run_id: str
    ) -> None:
        self._client: Any = importlib.import_module(name)
        self._name = name
        self._run_id = run_id
        logs = str(folder / "swanlog")
        identity = {
            "wandb": {"name": folder.name, "dir": str(folder), "id": run_id},
            "swanlab": {"experiment_name": folder.name, "logdir": logs, "id": run_id},
            "trackio": {"name": folder.name},  # which goes on with a run of the same name
        }
        self._client.init(project=project, config=settings, resume="allow", **identity[name])

    def log(self, values: dict[str, float], step: int) -> None:
        """Send numbers of one iteration."""
        self._client.log(values, step=step)

    def attach(self, verdict: str, files: Sequence[Path]) -> None:
        """Add the verdict and files; swanlab has no files and shows their text."""
        if self._name == "swanlab":
            texts = {"verdict": verdict} | {f.name: read_regular(f).decode() for f in files}
            self._client.log({name: self._client.Text(text) for name, text in texts.items()})
            return
        self._client.log({"verdict": verdict})
        for file in files:
            name = f"{self._run_id}-{file.name}"
            self._client.log_artifact(str(file), name=name, type="verdict")

    def close(self) -> None:
        """Send what is held back, and end the run there."""
        self._client.finish()


class _MlflowRun:
    """A run in mlflow, which is found again by a tag."""

    def __init__(
        self, name: str, project: str, settings: dict[str, Any], folder: Path, run_id: str
    ) -> None:
        self._client: Any = importlib.import_module(name).MlflowClient()
        experiment = self._client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(project)
        runs = self._client.search_runs([number], f"tags.nested_tune = '{run_id}'")
        tags = {"nested_tune": run_id}
        run = runs[0] if runs else self._client.create_run(number, run_name=folder.name, tags=tags)
        self._run_id = run.info.run_id
        self._client.update_run(self._run_id, status="RUNNING")
        self._client.log_dict(self._run_id, settings, "config.json")

    def log(self, values: dict[str, float], step: int) -> None:
        """Send numbers of one iteration."""
        for name, value in values.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def attach(self, verdict: str, files: Sequence[Path]) -> None:
        """Add the verdict as a tag, and files."""
        self._client.set_tag(self._run_id, "verdict", verdict)
        for file in files:
            self._client.log_artifact(self._run_id, str(file))

    def close(self) -> None:
        """End the run there."""
        self._client.set_terminated(self._run_id)


class _ReportingCallback:
    """Sends reports to services, and hands them to the callback that it wraps."""

    def __init__(self, services: dict[str, Any], wrapped: TrainingCallback | None) -> None:
        self._services = services
        self._wrapped = wrapped

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Send a training report."""
        self._send(train_info)
        if self._wrapped is not None:
            self._wrapped.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Send an evaluation."""
        self._send(val_info)
        if self._wrapped is not None:
            self._wrapped.on_val_loss_report(val_info)

    def _send(self, info: dict[str, Any]) -> None:
        """Send numbers; a service that fails is warned of once and is sent no more."""
        numbers = {name: v for name, v in info.items() if isinstance(v, int | float)}
        finite = {name: float(v) for name, v in numbers.items() if math.isfinite(v)}
        for name, service in list(self._services.items()):
            try:
                service.log(finite, info["iteration"])
            except Exception as error:  # of a client or of the way to its server
                del self._services[name]
                warnings.warn(
                    f"report_to: {name} took no report of iteration {info['iteration']}, and is "
                    f"sent no more of this training, which goes on: {shorten(error, 200)}",
                    stacklevel=3,
                )


class Services:
    """The services of a configuration's `report_to`, for one fine-tune."""

    def __init__(self, config: FineTuneConfig) -> None:
        """Raises ConfigError for a service that is not known or whose client is not installed."""
        self._config = config
        self._names = configured_services(config)

    @contextmanager
    def reporting(
        self, run: RunDirectory, callback: TrainingCallback | None
    ) -> Iterator[TrainingCallback]:
        """Yield a callback that reports to the services and to `callback`, for a training.

        Raises ConfigError for a service that cannot be reached.
        """
        services = {}
        with ExitStack() as stack:
            for name in self._names:
                try:
                    services[name] = self._open(name, run)
                except Exception as error:  # of a client or of the way to its server
                    raise ConfigError(f"report_to: {name} cannot be used: {error}") from error
                stack.callback(_warning_of_failure, f"{name} was not closed", services[name].close)
            yield _ReportingCallback(services, callback)

    @contextmanager
    def attaching_verdict_at_end(self, run: RunDirectory) -> Iterator[None]:
        """Add verdict, gate.json and report.html to each service's run when the block ends.

        A service that cannot take them is warned of: the run is done without it.
        """
        try:
            yield
        finally:
            if run.result.is_file() and run.gate.is_file():
                for name in self._names:
                    failed = f"the verdict was not attached: {name}"
                    _warning_of_failure(failed, self._attach_verdict, name, run)

    def _attach_verdict(self, name: str, run: RunDirectory) -> None:
        verdict = read_verdict(run.gate).word
        with closing(self._open(name, run)) as service:
            service.attach(verdict, [file for file in (run.gate, run.report) if file.is_file()])

    def _open(self, name: str, run: RunDirectory) -> Any:
        """Open the run in a service, or open it again."""
        service = _MlflowRun if name == "mlflow" else _WandbRun
        project = self._config.project_name or "nested-tune"
        settings = self._config.model_dump(mode="json")
        return service(name, project, settings, run.path.resolve(), _run_id(run))


def _warning_of_failure(failed: str, call: Callable[..., None], *arguments: Any) -> None:
    """Call, and warn of what a client, the way to its server or a damaged file raises."""
    try:
        call(*arguments)
    except Exception as error:
        warnings.warn(f"report_to: {failed}: {error}", stacklevel=2)


@dataclass(frozen=True)
class _RunRecord:
    """RUN_DIR/report-to.json: what the services know the run by; swanlab takes 21 characters."""

    run_id: str


_RUN_RECORD_FILE = JsonFile(_RunRecord, None)


def _run_id(run: RunDirectory) -> str:
    try:
        return _RUN_RECORD_FILE.read(run.report_to).run_id
    except DamagedError:  # or a first process: then the services begin anew
        record = _RunRecord(secrets.token_hex(11)[:21])
        _RUN_RECORD_FILE.write(run.report_to, record)
        return record.run_id


AROUND = AroundRun(run=lambda work: Services(work.config).attaching_verdict_at_end(work.run))
REPORTING = ReportingServices(Services)
