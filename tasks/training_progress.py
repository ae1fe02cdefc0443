"""What a flow run's page shows while it trains, and whether the run was cancelled there meanwhile.

The page has a progress bar, and the loss as a picture. Both are one row of the server's database
each, updated in place. How often depends on the time that has passed alone, so that a run of many
steps costs no more pages than one of few.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client

from nested_core.config.schema import FineTuneConfig
from nested_core.records.metrics import read_metrics
from nested_core.records.plan import TrainingPlan, join_last_losses, read_plan
from nested_core.report.curves import describe_curves
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.duration_format import format_duration
from tasks.artifact_client import ArtifactClient, artifact_key
from tasks.prefect_server import tolerating_server_outage

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_CHECKS = 0.5
# Between two updates: at least so long, and so much of the time since the first report.
MIN_SECONDS_BETWEEN_UPDATES = 2.0
UPDATE_GAP_SHARE_OF_ELAPSED_TIME = 0.1
SECONDS_TO_FINISH = 5.0
SECONDS_BETWEEN_CANCEL_CHECKS = 20.0
CONSOLE_ONLY_LOG_EXTRA = {"send_to_api": False}  # a line of the log is a row of the database


@dataclass
class TrainingPages:
    """The two artifacts, what they show, and when they are due.

    `steps` are those of the whole run, `first_step` the one that it went on from; `records` are as
    in metrics.jsonl, and not finite losses None.
    """

    config: FineTuneConfig
    steps: int
    first_step: int = 0
    clock: Callable[[], float] = time.monotonic
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # When training began here, and when the pages are to be shown again
        self._began_at = self.clock()
        self._due_at = self._began_at

    def add_earlier_reports(self, records: list[dict[str, Any]]) -> None:
        """Add the reports that a run made before it was stopped, up to where it goes on."""
        self.records += [record for record in records if record["step"] <= self.first_step]

    def add_training_loss(self, info: Mapping[str, Any]) -> None:
        """Add a report as mlx-lm's callbacks receive it; it touches no network."""
        step, loss = info.get("step", info["iteration"]), finite_or_none(info["train_loss"])
        speed = info.get("tokens_per_second")
        self.records.append({"step": step, "loss": loss, "tokens_per_second": speed})

    def add_validation_loss(self, step: int, loss: float) -> None:
        """Add an evaluation."""
        self.records.append({"step": step, "val_loss": finite_or_none(loss)})

    def is_due(self) -> bool:
        """Whether there is something to show, and the last update is long enough ago."""
        return bool(self.records) and self.clock() >= self._due_at

    def show(self, artifacts: ArtifactClient, step: int) -> None:
        """Publish both as of a step."""
        now = self.clock()
        pause = max(
            MIN_SECONDS_BETWEEN_UPDATES, UPDATE_GAP_SHARE_OF_ELAPSED_TIME * (now - self._began_at)
        )
        self._due_at = now + pause
        name = self.config.registry.name
        percent = 100.0 * min(step / self.steps, 1.0) if self.steps else 100.0
        artifacts.publish_progress(
            artifact_key(name, "training-progress"), percent, self.describe(step)
        )
        page = describe_curves(self.records, self.steps, str(self.config.data))
        description = f"The curves of {join_last_losses(self.records, None)}"
        artifacts.publish_page(artifact_key(name, "loss-curve"), page, description)

    def describe(self, step: int) -> str:
        """`step 40 of 120; 3 min left; 1,234 tokens/s`."""
        parts = [f"Step {step:,} of {self.steps:,}"]
        done = step - self.first_step
        if done > 0 and step < self.steps:
            elapsed = self.clock() - self._began_at
            parts.append(f"{format_duration(elapsed / done * (self.steps - step))} left")
        speeds = (record.get("tokens_per_second") for record in reversed(self.records))
        if (speed := next((each for each in speeds if each is not None), None)) is not None:
            parts.append(f"{speed:,.0f} tokens/s")
        return "; ".join(parts)


class PrefectProgress:
    """Follows a trainer from a thread of its own: its pages, and lines on the worker's console.

    Training never waits for the server: while that cannot be reached, only the pages are behind.

    A cancel comes from the worker as SIGTERM. A worker stops listening for cancels, until it is
    started again, once its server was away for about a minute (prefect 3.8.8,
    _internal/observers.py: ten connections, then three looks). So the run asks by itself, too.
    """

    def __init__(self, config: FineTuneConfig, run: RunDirectory) -> None:
        self._config = config
        self._run = run
        self._logger = get_run_logger()

        # The thread, while a trainer is followed
        self._trainer: Any = None
        self._plan: TrainingPlan | None = None
        self._pages: TrainingPages | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

        # When a line was logged last, and when it was asked whether the run is cancelled
        self._logged_at = 0.0
        self._asked_at = time.monotonic()

    def start(self, trainer: Any) -> None:
        """Follow a trainer, or the group of processes, from its first step on."""
        self._trainer = trainer
        self._plan = read_plan(self._run.plan)
        self._pages = TrainingPages(self._config, trainer.steps, trainer.current_step)
        if trainer.current_step > 0:
            self._pages.add_earlier_reports(read_metrics(self._run.metrics))
        context = copy_context()  # the run that artifacts belong to
        self._thread = threading.Thread(
            target=context.run, args=(self._follow_run, self._pages), name="progress", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Show where training ended, and stop following it."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=SECONDS_TO_FINISH)
        if self._pages is not None:
            self._logger.info("%s", self._describe_progress(self._pages))

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Keep a report for the curve."""
        if self._pages is not None:
            self._pages.add_training_loss(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Keep an evaluation for the curve."""
        if self._pages is not None:
            self._pages.add_validation_loss(self._trainer.current_step, val_info["val_loss"])

    def _follow_run(self, pages: TrainingPages) -> None:
        is_last = False
        with ArtifactClient() as artifacts, get_client(sync_client=True) as client:
            while not is_last:
                is_last = self._done.wait(SECONDS_BETWEEN_CHECKS)
                self._log_progress(pages)
                if pages.is_due() or is_last:
                    pages.show(artifacts, self._trainer.current_step)
                self._stop_if_cancelled(client)

    def _stop_if_cancelled(self, client: SyncPrefectClient) -> None:
        if time.monotonic() - self._asked_at < SECONDS_BETWEEN_CANCEL_CHECKS:
            return
        self._asked_at = time.monotonic()
        with tolerating_server_outage("whether the run is cancelled is asked later"):
            state = client.read_flow_run(UUID(str(runtime.flow_run.id))).state
            if state is not None and (state.is_cancelling() or state.is_cancelled()):
                self._logger.info("The run is cancelled: a checkpoint is written, and it ends.")
                self._trainer.stop_training()

    def _log_progress(self, pages: TrainingPages) -> None:
        if not any("loss" in record for record in pages.records):
            return
        if time.monotonic() - self._logged_at < SECONDS_BETWEEN_LINES:
            return
        self._logged_at = time.monotonic()
        self._logger.info("%s", self._describe_progress(pages), extra=CONSOLE_ONLY_LOG_EXTRA)

    def _describe_progress(self, pages: TrainingPages) -> str:
        """A line of the log: the step, the time left, and the losses with their data."""
        position = pages.describe(self._trainer.current_step)
        return f"{position}: {join_last_losses(pages.records, self._plan)}"
