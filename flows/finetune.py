"""The flow: validate, load, train, gate, and for what passed register and promote."""

from __future__ import annotations

from pathlib import Path

from prefect import flow, runtime
from pydantic import Field

from nested_core import pipeline
from nested_core.config import FineTuneConfig
from nested_core.publishing import champion_or_none
from nested_core.run_directory import RunDirectory, new_run_name, open_run
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
def finetune(config: FinetuneParameters) -> Path:
    """Fine-tune; Failed where a step fails, and where the gate rejects what came out.

    The flow itself is never retried: that would train again. A retry of the flow run (`prefect
    flow-run retry`) finds its run directory by its id and goes on from the last checkpoint.
    """
    settings, run = config.configuration(), _open(config)
    with run.locked():
        pipeline.begin(settings, run, resume=run.config.exists())
        validate(settings, run.path)
        load(settings, run.path)
        train(settings, run.path)
        gate(settings, run.path)
        if settings.registry.path is not None:
            _publish(settings, run)
    return run.path


def _open(config: FinetuneParameters) -> RunDirectory:
    """The directory given, or one keyed by the flow run's id, which a retry finds again."""
    if config.run_dir is not None:
        is_retry = (runtime.flow_run.run_count or 1) > 1
        return open_run(Path(config.run_dir), resume=config.resume or is_retry)
    name = new_run_name(runtime.flow_run.scheduled_start_time, str(runtime.flow_run.id))
    path = RUNS / name
    return open_run(path, resume=RunDirectory(path).is_begun())


def _publish(settings: FineTuneConfig, run: RunDirectory) -> None:
    path, name = settings.registry.path, settings.registry.name
    champion = champion_or_none(Path(str(path)), str(name))
    version = register(settings, run.path)
    if settings.registry.promote != "never":
        promote(settings, run.path, version, champion)
