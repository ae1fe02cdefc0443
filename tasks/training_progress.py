"""What a flow run's page shows while it trains.

The page has a progress bar, and the loss as a picture. Both are one row of the server's database
each, updated in place. How often depends on the time that has passed alone, so that a run of many
steps costs no more pages than one of few.
"""

from __future__ import annotations

import threading
import time
from contextvars import copy_context
from dataclasses import dataclass

from prefect import get_run_logger

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.records.plan import join_last_losses
from nested_core.report.curves import describe_curves
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.reports.run_progress import RunProgress
from tasks.artifact_client import ArtifactClient, artifact_key

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_CHECKS = 0.5
# Between two updates: at least so long, and so much of the time since the first report.
MIN_SECONDS_BETWEEN_UPDATES = 2.0
UPDATE_GAP_SHARE_OF_ELAPSED = 0.1
SECONDS_TO_FINISH = 5.0
CONSOLE_ONLY_LOG_EXTRA = {"send_to_api": False}  # a line of the log is a row of the database


@dataclass
class TrainingPages:
    """The two artifacts, what they show, and when they are due."""

    config: FineTuneConfig
    progress: RunProgress

    def __post_init__(self) -> None:
        self._due_at = 0.0  # in seconds since training began here

    def describe(self) -> str:
        """The step, the time, and the speed of the last report."""
        progress = self.progress
        parts = (progress.describe_position(), progress.describe_time(), progress.describe_speed())
        return "; ".join(filter(None, parts))

    def is_due(self) -> bool:
        """Whether there is something to show, and the last update is long enough ago."""
        return bool(self.progress.records) and self.progress.seconds >= self._due_at

    def show(self, artifacts: ArtifactClient) -> None:
        """Publish both."""
        now = self.progress.seconds
        self._due_at = now + max(MIN_SECONDS_BETWEEN_UPDATES, UPDATE_GAP_SHARE_OF_ELAPSED * now)
        name, records, plan = self.config.registry.name, self.progress.records, self.progress.plan
        steps = 0 if plan is None else plan.steps
        percent = 100.0 * min(self.progress.last_record["step"] / max(steps, 1), 1.0)
        key = artifact_key(name, "training-progress")
        artifacts.publish_progress(key, percent, self.describe())
        unit = seams.unit_of_loss(self.config.training.loss)
        page = describe_curves(records, steps, str(self.config.data), unit)
        description = f"The curves of {join_last_losses(records, None)}"
        artifacts.publish_page(artifact_key(name, "loss-curve"), page, description)


class PrefectProgress:
    """Follows a trainer from a thread of its own: its pages, and lines on the worker's console.

    Training never waits for the server: while that cannot be reached, only the pages are behind.
    """

    def __init__(self, config: FineTuneConfig, run: RunDirectory) -> None:
        self._pages = TrainingPages(config, RunProgress(run))
        self._logger = get_run_logger()

        # The thread, while a trainer is followed
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

        self._logged_at = 0.0  # when a line was logged last

    def start(self) -> None:
        """Follow training from its first step on."""
        context = copy_context()  # the run that artifacts belong to
        self._thread = threading.Thread(
            target=context.run, args=(self._follow_run,), name="progress", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Show where training ended, and stop following it."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=SECONDS_TO_FINISH)
            self._logger.info("%s", self._describe_progress())

    def _follow_run(self) -> None:
        pages, is_last = self._pages, False
        with ArtifactClient() as artifacts:
            while not is_last:
                is_last = self._done.wait(SECONDS_BETWEEN_CHECKS)
                pages.progress.read()
                self._log_progress()
                if pages.is_due() or is_last:
                    pages.show(artifacts)

    def _log_progress(self) -> None:
        has_loss = any("loss" in record for record in self._pages.progress.records)
        if not has_loss or time.monotonic() - self._logged_at < SECONDS_BETWEEN_LINES:
            return
        self._logged_at = time.monotonic()
        self._logger.info("%s", self._describe_progress(), extra=CONSOLE_ONLY_LOG_EXTRA)

    def _describe_progress(self) -> str:
        """A line of the log: the step, the time left, and the losses with their data."""
        progress = self._pages.progress
        return f"{self._pages.describe()}: {join_last_losses(progress.records, progress.plan)}"
