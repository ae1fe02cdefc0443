"""The flow: validate, load, train, gate, and for what passed register and promote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, runtime
from prefect.states import Cancelled, Completed, Failed, State
from pydantic import Field

from flows.logs import outlive_the_worker
from flows.outcome import describe_loss, describe_rejection, short
from flows.roots import confine_configuration, confined
from flows.stopping import Stopper
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import GateRejected, TrainingStopped
from nested_core.pipeline import steps
from nested_core.pipeline.continual import champion_or_none, unchanged_since
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
    is_begun = run.is_begun()
    with run.locked():
        steps.begin(settings, run, resume=is_begun)
        link_run(run.path)
        validate(settings, run.path)
        champion = unchanged_since(settings, run)
        if champion is not None:
            return Completed(message=f"skipped: data unchanged since {champion}")
        load(settings, run.path)
        try:
            _train(settings, run)
        except TrainingStopped as error:
            return Cancelled(message=f"resumable by a retry of this flow run: {error}")
        return _judge_and_publish(settings, run)


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


def _train(settings: FineTuneConfig, run: RunDirectory) -> None:
    """Train; at SIGINT or SIGTERM, which Prefect sends to cancel, a checkpoint is written first."""
    stopper = Stopper()
    with stopper.installed(run):
        train(settings, run.path, stopper.watch)
        stopper.release()


def _judge_and_publish(settings: FineTuneConfig, run: RunDirectory) -> State[Any]:
    """What became of the adapter; nothing but the gate happens without a registry."""
    registry = settings.registry
    if registry.path is None or registry.name is None:
        return _judge(settings, run) or Completed(message=f"passed the gate: {describe_loss(run)}")
    champion = champion_or_none(Path(registry.path), registry.name)
    rejected = _judge(settings, run)
    where = {"run_dir": str(run.path.resolve())}
    if rejected is not None:
        emit("rejected", registry.name, where | {"reason": rejected.message})
        return rejected
    version = register(settings, run.path, champion)
    where["registry"] = str(Path(registry.path).resolve())
    emit("verified", registry.name, {"version": version} | where)
    done = "registered" if registry.promote == "never" else promote(registry, version, champion)
    return Completed(message=f"verified {short(version)}: {describe_loss(run)}; {done}")


def _judge(settings: FineTuneConfig, run: RunDirectory) -> State[Any] | None:
    """Failed, with the reasons and without a new try, where the gate rejects; else None."""
    try:
        gate(settings, run.path)
    except GateRejected as error:
        return Failed(message=describe_rejection(run), data=error)
    return None
