"""The Prefect flow of a fine-tune: `pipeline.finetune`, with each step as a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, runtime
from prefect.states import Cancelled, Completed, Failed, State
from pydantic import Field

from flows.allowed_folders import confine_configuration, confined
from flows.prefect_logs import outlive_the_worker
from flows.state_messages import describe_loss, describe_rejection, short
from flows.stop_signals import Stopper
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import GateRejected, TrainingStopped
from nested_core.gate.verdict import Verdict, read_verdict
from nested_core.pipeline.finetune import FinetuneResult, Hooks
from nested_core.pipeline.finetune import finetune as run_finetune
from nested_core.pipeline.steps import TrainResult
from nested_core.storage.run_directory import RUNS, RunDirectory, new_run_name, open_run
from tasks.events import emit
from tasks.gate import gate
from tasks.load import load
from tasks.promote import promote
from tasks.register import register
from tasks.run_page import link_run
from tasks.train import train
from tasks.validate import validate


class FinetuneParameters(FineTuneConfig):
    """A fine-tune as the flow takes it: the configuration, and where the run is kept."""

    run_dir: str | None = Field(default=None, description="default: runs/<UTC time>-<flow run id>")
    resume: bool = Field(default=False, description="go on with the run in run_dir")

    def configuration(self) -> FineTuneConfig:
        """The configuration alone."""
        return FineTuneConfig(**self.model_dump(exclude={"run_dir", "resume"}))


@flow(name="finetune", retries=0, flow_run_name="finetune {config.model}")
def finetune(config: FinetuneParameters) -> State[Any]:
    """Fine-tune an adapter, judge it, and register and promote what passed.

    Failed where a step fails, and where the gate rejects what came out. The message of the state
    says the result. Cancelled, the run keeps a checkpoint. A retry of the flow run (the button, or
    `prefect flow-run retry`) finds its run directory by its id and goes on from the last
    checkpoint; the flow never retries by itself, for that would train again.
    """
    outlive_the_worker()
    settings = config.configuration()
    confine_configuration(settings)
    run = _open(config)
    try:
        result = run_finetune(settings, run, TaskHooks(), resume=run.is_begun())
    except TrainingStopped as error:
        return Cancelled(message=f"resumable by a retry of this flow run: {error}")
    except GateRejected as error:
        if read_verdict(run.gate).has_passed:
            raise  # the registry refused what this gate let through: that is no verdict on the run
        message = describe_rejection(run)
        if settings.registry.name is not None:
            payload = {"run_dir": str(run.path.resolve()), "reason": message}
            emit("rejected", settings.registry.name, payload)
        return Failed(message=message, data=error)
    return Completed(message=_describe(result))


class TaskHooks(Hooks):
    """Each step of a fine-tune as a Prefect task, with the links and events around it."""

    def on_message(self, message: str) -> None:
        """Log what a step waits for outside of its task."""
        get_run_logger().info("%s", message)

    def begin(self, config: FineTuneConfig, run: RunDirectory, *, resume: bool) -> None:
        """Begin, and link the run directory from the flow run's page."""
        super().begin(config, run, resume=resume)
        link_run(run.path)

    def validate(self, config: FineTuneConfig, run: RunDirectory) -> None:
        """The task `validate`."""
        validate(config, run.path)

    def load(self, config: FineTuneConfig, run: RunDirectory) -> None:
        """The task `load`."""
        load(config, run.path)

    def train(self, config: FineTuneConfig, run: RunDirectory) -> TrainResult:
        """The task `train`; at SIGINT or SIGTERM it saves a checkpoint."""
        stopper = Stopper()
        with stopper.installed(run):
            result = train(config, run.path, stopper.watch)
            stopper.release()
        return result

    def judge(self, config: FineTuneConfig, run: RunDirectory) -> Verdict:
        """The task `gate`."""
        gate(config, run.path)
        return read_verdict(run.gate)

    def measure_test(self, config: FineTuneConfig, run: RunDirectory) -> float:
        """Log the loss on the test set."""
        loss = super().measure_test(config, run)
        get_run_logger().info("Test loss %.4f", loss)
        return loss

    def register(self, config: FineTuneConfig, run: RunDirectory, champion: str | None) -> str:
        """The task `register`, and the event that promotion listens to."""
        version = register(config, run.path, champion)
        registry = config.registry
        payload = {
            "version": version,
            "run_dir": str(run.path.resolve()),
            "registry": str(Path(str(registry.path)).resolve()),
        }
        emit("verified", str(registry.name), payload)
        return version

    def promote(self, config: FineTuneConfig, version: str, champion: str | None) -> str:
        """The task `promote`."""
        return promote(config.registry, version, champion)


def _describe(result: FinetuneResult) -> str:
    """The message of a flow run that completed."""
    if result.unchanged_since is not None:
        return f"skipped: data unchanged since {result.unchanged_since}"
    loss = describe_loss(result.run)
    if result.version is None:
        return f"passed the gate: {loss}"
    return f"verified {short(result.version)}: {loss}; {result.promotion or 'registered'}"


def _open(config: FinetuneParameters) -> RunDirectory:
    """The directory given, or one keyed by the flow run's id, which a retry finds again."""
    if config.run_dir is not None:
        path = confined(config.run_dir, "run_dir")
        is_retry = (runtime.flow_run.run_count or 1) > 1 and RunDirectory(path).is_begun()
        return open_run(path, resume=config.resume or is_retry)
    # The end of the id: the front of it is the time in some versions of UUID. A retry has another
    # scheduled start, so that a directory that is there already is found by the id alone.
    key = str(runtime.flow_run.id).replace("-", "")[-8:]
    begun = sorted(RUNS.glob(f"*-{key}"))
    path = begun[0] if begun else RUNS / new_run_name(runtime.flow_run.scheduled_start_time, key)
    return open_run(path, resume=RunDirectory(path).is_begun())
