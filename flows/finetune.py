"""The Prefect flow of a fine-tune: `pipeline.finetune`, with each step as a task.

The tasks, in this order: validate, load, train, gate, and register (tasks/finetune.py); before
register the loss on test.jsonl is measured, if `test` is set. nested_core/pipeline/finetune.py
lists what each step leaves on disk; there the gate is called `judge`.

Importing this module has to be quick, so it loads no mlx. After a crash a worker imports it, to
look for hooks, and then reports the crash again (prefect 3.9.1, runner/_flow_run_executor.py and
workers/base.py). A late report would end the retry that may have begun by then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from prefect import flow, get_run_logger, runtime
from prefect.states import Cancelled, Completed, Failed, State

from flows.flow_runs.allowed_folders import (
    require_allowed,
    require_known_name,
    with_allowed_paths,
    with_trusted_code,
)
from flows.flow_runs.cancel_watch import stopping_where_cancelled
from flows.flow_runs.nights import name_flow_run, tag_flow_run
from flows.flow_runs.prefect_logs import prepare_logs, tolerate_closed_output
from flows.flow_runs.run_place import require_begun_here
from flows.flow_runs.watchers import list_watchers
from flows.process.os_errors import explain
from flows.process.stop_signals import Stopper
from nested_core.config.schema import FineTuneConfig
from nested_core.config.section_base import key
from nested_core.errors import (
    DamagedError,
    DatasetError,
    GateRejected,
    NestedTuneError,
    TrainingStopped,
)
from nested_core.records.outcome_names import OUTCOME_BY_DECISION, Outcome
from nested_core.records.skip import describe_repetition
from nested_core.storage.checkpoint_verification import list_checkpoints
from nested_core.storage.run_directory import (
    DEFAULT_RUNS_FOLDER,
    RunDirectory,
    find_run_of,
    new_run_name,
    open_run,
    run_key,
)
from nested_core.text.digest_format import shorten_digest
from nested_core.text.foreign_text import escape

if TYPE_CHECKING:
    from nested_core.pipeline.finetune import FinetuneResult


class FinetuneParameters(FineTuneConfig):
    """A fine-tune as the flow takes it: the configuration, and where the run is kept."""

    run_dir: str | None = key(
        None, "where the run is, null: runs/<UTC time>-<flow run id>", path="local", in_form=False
    )
    resume: bool = key(False, "resume the run in run_dir", in_form=False)

    def configuration(self) -> FineTuneConfig:
        """The configuration alone."""
        return FineTuneConfig(**self.model_dump(exclude={"run_dir", "resume"}))


@flow(name="finetune", retries=0, flow_run_name=name_flow_run)
def finetune(config: FinetuneParameters) -> State[None]:
    """Validate the data, load the model, train, run the gate, and register and promote what passed.

    Failed where a step fails, and where the gate rejects the adapter: then the state is named
    `Rejected: ...`. Completed otherwise, named by the outcome (see `Outcome`): Promoted, Verified,
    Kept the champion, or why nothing was trained. Its message has the figures. A run that is
    cancelled or suspended while it trains keeps a checkpoint. A retry of the flow run (the button,
    or the automation after a crash), or Resume, finds its run directory by its id and goes on from
    the last checkpoint. The flow never retries by itself, for that would train again.
    """
    tolerate_closed_output()
    prepare_logs()
    tag_flow_run()
    for watcher in list_watchers():
        if other := watcher.find_other_run():
            return Completed(name=Outcome.SKIPPED_ANOTHER_NIGHT, message=other)
    try:
        settings = with_trusted_code(with_allowed_paths(config.configuration()))
        require_known_name(settings.registry)
        run = _open_run_directory(config)
    except NestedTuneError as error:
        return _failed_state(error)
    try:
        state = _run_pipeline(settings, run)
    except Exception as error:  # of the machine or of a library: Prefect calls the run Failed
        failed: State[None] = Failed(message=f"{type(error).__name__}: {error}")
        for watcher in list_watchers():
            watcher.end(settings, run, failed)
        raise
    for watcher in list_watchers():
        watcher.end(settings, run, state)
    return state


def _run_pipeline(config: FineTuneConfig, run: RunDirectory) -> State[None]:
    """Run the pipeline with its steps as tasks, and return the state in which the flow run ends."""
    from flows.flow_runs.prefect_hooks import StepsAsTasks
    from nested_core.pipeline.finetune import finetune as run_finetune
    from nested_core.records.verdict_file import read_verdict
    from tasks.events import emit_adapter_event

    resumed = _describe_resumption(run)
    stopper = Stopper()
    try:
        with stopper.handling_signals(run), stopping_where_cancelled() as watch:
            steps = StepsAsTasks(stopper)
            # Whether a directory may be resumed was decided when it was opened
            result = run_finetune(config, run, steps, resume=run.is_nonempty())
    except TrainingStopped as error:
        watch.raise_if_suspended()
        message = f"resumable by a retry of this flow run: {error.describe_for('page')}"
        # A worker puts its own message in place of this one once the process has ended (prefect
        # 3.9.1, runner/_cancellation_manager.py). The log and the page of the run keep it.
        get_run_logger().warning("Cancelled, %s What is done is in %s.", message, run.path)
        return Cancelled(message=message)
    except GateRejected as error:
        verdict = read_verdict(run.gate)
        if verdict.has_passed:  # the gate passed the adapter, but the registry refused it
            return _failed_state(error)
        message = f"{resumed}{escape(verdict.summary())}{_describe_held_out(config, run)}"
        message += _describe_choice(config, run)
        message += describe_repetition(config)
        if config.registry.name is not None:
            payload = {"run_dir": str(run.path.resolve()), "reason": message}
            emit_adapter_event("rejected", config.registry.name, payload)
        return Failed(name=verdict.outcome, message=message, data=error)
    except NestedTuneError as error:
        return _failed_state(error)
    except OSError as error:  # that a task's retries did not outlast
        message = f"{type(error).__name__}: {explain(error).describe_for('page')}"
        return Failed(message=message, data=error)
    outcome, message = _describe_outcome(config, result)
    message = f"{resumed}{message}{_describe_held_out(config, run)}{_describe_choice(config, run)}"
    return Completed(name=outcome, message=message)


def _describe_choice(config: FineTuneConfig, run: RunDirectory) -> str:
    """Return how training started, and why, for a message; empty if the configuration said how.

    For example `; training from the base, to follow version 3f2a...: ...`.
    """
    from nested_core.records.start import CONFIGURED, START_FILE, Start

    start = START_FILE.read(run.start) if run.start.exists() else Start(None, CONFIGURED)
    return "" if start.choice == CONFIGURED else f"; {start.describe(config.registry.name)}"


def _describe_held_out(config: FineTuneConfig, run: RunDirectory) -> str:
    """Return `; valid.jsonl has changed ...` if the champion was judged by other examples.

    Empty otherwise, and before the verdict.
    """
    from nested_core.pipeline.publishing import describe_changed_held_out
    from nested_core.records.dataset import read_dataset_record
    from nested_core.records.verdict_file import read_verdict

    if not run.gate.exists():
        return ""
    verdict, dataset = read_verdict(run.gate), read_dataset_record(run.dataset)
    note = describe_changed_held_out(config, verdict, dataset)
    return "" if note is None else f"; {note}"


def _failed_state(error: NestedTuneError) -> State[None]:
    """A failed state that says what a person can do about an error, in a page."""
    name = None
    if isinstance(error, DamagedError):
        name = Outcome.DAMAGED
    elif isinstance(error, DatasetError):
        name = Outcome.DATA_REFUSED
    message = f"{type(error).__name__}: {error.describe_for('page')}"
    return Failed(name=name, message=message, data=error)


def _describe_outcome(config: FineTuneConfig, result: FinetuneResult) -> tuple[Outcome, str]:
    """The outcome of a flow run that completed, and its message."""
    if result.skipped is not None:
        return result.skipped.outcome, escape(result.skipped.describe())
    if result.kept_champion is not None:
        return Outcome.KEPT_CHAMPION, f"{result.promotion}{describe_repetition(config)}"
    loss = "" if result.verdict is None else escape(result.verdict.describe_losses())
    if result.version is None:
        return Outcome.VERIFIED, f"passed the gate: {loss}"
    done = result.promotion or "registered"
    message = f"verified {shorten_digest(result.version)}: {loss}; {done}"
    outcome = _find_outcome(config, result)
    return outcome, message + ("" if outcome == Outcome.PROMOTED else describe_repetition(config))


def _find_outcome(config: FineTuneConfig, result: FinetuneResult) -> Outcome:
    """Return the outcome of a run with this result, which was not skipped."""
    from nested_core.pipeline.publishing import is_registered_from
    from nested_core.registry.promotion_policy import effective_rule

    outcome = None if result.decision is None else result.decision.outcome
    if outcome in OUTCOME_BY_DECISION:
        return OUTCOME_BY_DECISION[outcome]
    if outcome == "already_champion":
        # A run that crashed after its promotion finds its own version there.
        is_own = is_registered_from(config, result.run, str(result.version))
        return Outcome.PROMOTED if is_own else Outcome.KEPT_CHAMPION
    has_rival = result.verdict is not None and result.verdict.champion is not None
    must_be_better = effective_rule(config.registry).must_be_better
    is_refused = must_be_better and outcome in ("refused", "registered")
    return Outcome.KEPT_CHAMPION if has_rival and is_refused else Outcome.VERIFIED


def _describe_resumption(run: RunDirectory) -> str:
    """Return `begun 2 times, last from ...: ` for a retried flow run; empty for its first run."""
    count = runtime.flow_run.run_count or 1
    if count == 1:
        return ""
    checkpoints = list_checkpoints(run.checkpoints)
    where = f"from {checkpoints[-1].name}" if checkpoints else "from its beginning"
    return f"begun {count} times, last {where}: "


def _open_run_directory(config: FinetuneParameters) -> RunDirectory:
    """Open the run directory that is given, or one named by the flow run's id.

    A retry of the flow run finds that one again, and resumes it.
    """
    if config.run_dir is not None:
        path = require_allowed(config.run_dir, "run_dir")
        if not RunDirectory(path).is_nonempty():
            require_begun_here()
        is_retry = (runtime.flow_run.run_count or 1) > 1 and RunDirectory(path).is_nonempty()
        return open_run(path, resume=config.resume or is_retry)
    # A retry has another scheduled start, so that a directory that is there already is found by the
    # id alone.
    flow_run = UUID(str(runtime.flow_run.id))
    begun = find_run_of(flow_run)
    if begun is None:
        require_begun_here()
    name = new_run_name(runtime.flow_run.scheduled_start_time, run_key(flow_run))
    path = DEFAULT_RUNS_FOLDER / name if begun is None else begun.path
    return open_run(path, resume=RunDirectory(path).is_nonempty())
