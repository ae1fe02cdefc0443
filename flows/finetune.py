"""The flow: validate, load, train, gate, and for what passed register and promote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, runtime
from prefect.states import Completed, State
from pydantic import Field

from nested_core import pipeline
from nested_core.config import FineTuneConfig
from nested_core.continual import champion_or_none, unchanged_since
from nested_core.errors import GateRejected
from nested_core.run_directory import RunDirectory, new_run_name, open_run
from tasks.events import emit
from tasks.gate import gate
from tasks.load import load
from tasks.promote import promote
from tasks.register import register
from tasks.train import train
from tasks.validate import validate

RUNS = Path("runs")


class FinetuneParameters(FineTuneConfig):
    """A fine-tune as the flow takes it: the configuration, and where the run is kept."""

    run_dir: str | None = Field(default=None, description="default: runs/<UTC time>-<flow run id>")
    resume: bool = Field(default=False, description="go on with the run in run_dir")

    def configuration(self) -> FineTuneConfig:
        """The configuration alone."""
        return FineTuneConfig(**self.model_dump(exclude={"run_dir", "resume"}))


@flow(name="finetune", retries=0, flow_run_name="finetune {config.model}")
def finetune(config: FinetuneParameters) -> State[Any]:
    """Fine-tune; Failed where a step fails, and where the gate rejects what came out.

    The flow itself is never retried: that would train again. A retry of the flow run (`prefect
    flow-run retry`) finds its run directory by its id and goes on from the last checkpoint. The
    message of a Completed state says what became of the adapter.
    """
    settings, run = config.configuration(), _open(config)
    with run.locked():
        pipeline.begin(settings, run, resume=run.config.exists())
        validate(settings, run.path)
        champion = unchanged_since(settings, run)
        if champion is not None:
            return Completed(message=f"skipped: data unchanged since {champion}")
        load(settings, run.path)
        train(settings, run.path)
        return Completed(message=_judge_and_publish(settings, run))


def _open(config: FinetuneParameters) -> RunDirectory:
    """The directory given, or one keyed by the flow run's id, which a retry finds again."""
    if config.run_dir is not None:
        is_retry = (runtime.flow_run.run_count or 1) > 1
        return open_run(Path(config.run_dir), resume=config.resume or is_retry)
    name = new_run_name(runtime.flow_run.scheduled_start_time, str(runtime.flow_run.id))
    path = RUNS / name
    return open_run(path, resume=RunDirectory(path).is_begun())


def _judge_and_publish(settings: FineTuneConfig, run: RunDirectory) -> str:
    """What became of the adapter; nothing but the gate happens without a registry."""
    section = settings.registry
    if section.path is None or section.name is None:
        gate(settings, run.path)
        return "passed the gate"
    champion = champion_or_none(Path(section.path), section.name)
    try:
        gate(settings, run.path)
    except GateRejected as error:
        emit("rejected", section.name, {"run_dir": str(run.path.resolve()), "reason": str(error)})
        raise
    version = register(settings, run.path, champion)
    payload = {"version": version, "registry": str(Path(section.path).resolve())}
    emit("verified", section.name, payload | {"run_dir": str(run.path.resolve())})
    if section.promote == "never":
        return f"registered {version}"
    return f"registered {version}: {promote(section, version, champion)}"
