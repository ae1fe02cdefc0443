"""The Prefect flow of a fine-tune: `pipeline.finetune`, with each step as a task.

Importing it loads no mlx. A worker imports it when a run has crashed, to look for hooks, and then
reports the crash a second time (prefect 3.8.8, runner/_flow_run_executor.py and workers/base.py).
That report would end a retry that has begun by then, so it must not be long in coming.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect import flow, runtime
from prefect.states import Cancelled, Completed, Failed, State

from flows.allowed_folders import refuse_python_scorers, require_allowed, require_allowed_paths
from flows.prefect_logs import say_errors_in_a_paragraph, tolerate_closed_output
from flows.state_messages import describe_loss, describe_rejection, shorten_version
from nested_core.config.schema import FineTuneConfig
from nested_core.config.section import key
from nested_core.errors import GateRejected, TrainingStopped
from nested_core.storage.run_directory import RUNS, RunDirectory, new_run_name, open_run

if TYPE_CHECKING:
    from nested_core.pipeline.finetune import FinetuneResult


class FinetuneParameters(FineTuneConfig):
    """A fine-tune as the flow takes it: the configuration, and where the run is kept."""

    run_dir: str | None = key(
        None, "where the run is kept; null: runs/<UTC time>-<flow run id>", in_form=False
    )
    resume: bool = key(False, "go on with the run in run_dir", in_form=False)

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
    from flows.task_hooks import TaskHooks
    from nested_core.gate.verdict import read_verdict
    from nested_core.pipeline.finetune import finetune as run_finetune
    from tasks.events import emit_adapter_event

    tolerate_closed_output()
    say_errors_in_a_paragraph()
    settings = config.configuration()
    require_allowed_paths(settings)
    refuse_python_scorers(settings)
    run = _open(config)
    try:
        result = run_finetune(settings, run, TaskHooks(), resume=run.is_nonempty())
    except TrainingStopped as error:
        return Cancelled(message=f"resumable by a retry of this flow run: {error}")
    except GateRejected as error:
        if read_verdict(run.gate).has_passed:
            raise  # the registry refused what this gate let through: that is no verdict on the run
        message = describe_rejection(run)
        if settings.registry.name is not None:
            payload = {"run_dir": str(run.path.resolve()), "reason": message}
            emit_adapter_event("rejected", settings.registry.name, payload)
        return Failed(message=message, data=error)
    return Completed(message=_describe(result))


def _describe(result: FinetuneResult) -> str:
    """The message of a flow run that completed."""
    if result.unchanged_since is not None:
        return f"skipped: data unchanged since {result.unchanged_since}"
    loss = describe_loss(result.run)
    if result.version is None:
        return f"passed the gate: {loss}"
    return f"verified {shorten_version(result.version)}: {loss}; {result.promotion or 'registered'}"


def _open(config: FinetuneParameters) -> RunDirectory:
    """The directory given, or one keyed by the flow run's id, which a retry finds again."""
    if config.run_dir is not None:
        path = require_allowed(config.run_dir, "run_dir")
        is_retry = (runtime.flow_run.run_count or 1) > 1 and RunDirectory(path).is_nonempty()
        return open_run(path, resume=config.resume or is_retry)
    # The end of the id: the front of it is the time in some versions of UUID. A retry has another
    # scheduled start, so that a directory that is there already is found by the id alone.
    key = str(runtime.flow_run.id).replace("-", "")[-8:]
    begun = sorted(RUNS.glob(f"*-{key}"))
    path = begun[0] if begun else RUNS / new_run_name(runtime.flow_run.scheduled_start_time, key)
    return open_run(path, resume=RunDirectory(path).is_nonempty())
