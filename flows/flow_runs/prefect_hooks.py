"""The steps of a fine-tune as Prefect tasks."""

from __future__ import annotations

from uuid import UUID

from prefect import get_run_logger, runtime

from flows.flow_runs.run_place import note_run_place
from flows.flow_runs.watchers import list_watchers
from flows.process.stop_signals import Stopper
from nested_core.config.schema import FineTuneConfig
from nested_core.measure.losses.loss_on_test_set import LossOnTestSet
from nested_core.models.session import Session
from nested_core.pipeline.hooks import Steps
from nested_core.records.result import TrainResult
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import read_verdict
from nested_core.registry import Decision
from nested_core.registry.promotion_policy import registry_location
from nested_core.storage.run_directory import RunDirectory
from tasks.finetune import gate, load, register, train, validate


class StepsAsTasks(Steps):
    """Each step of a fine-tune as a Prefect task, with the links and events around it."""

    def __init__(self, stopper: Stopper) -> None:
        self._stopper = stopper

    def on_message(self, message: str) -> None:
        """Log what a step waits for outside of its task."""
        get_run_logger().info("%s", message)

    def begin(self, config: FineTuneConfig, run: RunDirectory, *, resume: bool) -> None:
        """Begin, and tell the watchers."""
        super().begin(config, run, resume=resume)
        note_run_place(run.path)
        message = "continues from its last checkpoint" if resume else "has begun"
        for watcher in list_watchers():
            watcher.begin(config, run, message)

    def validate(self, config: FineTuneConfig, run: RunDirectory) -> None:
        """The task `validate`."""
        validate(config, run.path)

    def load(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> None:
        """The task `load`."""
        load(config, run.path, session)

    def train(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> TrainResult:
        """The task `train`; at SIGINT or SIGTERM it saves a checkpoint."""
        result = train(config, run.path, session, self._stopper.direct_signals_to)
        self._stopper.release_trainer()
        return result

    def judge(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> Verdict:
        """The task `gate`."""
        gate(config, run.path, session)
        return read_verdict(run.gate)

    def measure_test(
        self, config: FineTuneConfig, run: RunDirectory, session: Session
    ) -> LossOnTestSet:
        """Log the loss on the test set."""
        loss = super().measure_test(config, run, session)
        get_run_logger().info("%s", loss.describe())
        return loss

    def register(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> Decision:
        """The task `register`; a person is asked about a version that needs one."""
        decision = register(config, run.path, session)
        if decision.outcome == "waiting":
            path, name = registry_location(config.registry)
            for watcher in list_watchers():
                watcher.ask(path, name, decision.version, UUID(str(runtime.flow_run.id)))
        return decision
