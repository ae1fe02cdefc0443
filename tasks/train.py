"""The task that trains; tried again, it goes on from the last checkpoint."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (  # noqa: TID251  # numbers alone
    create_progress_artifact,
    update_progress_artifact,
)

from nested_core.config.schema import FineTuneConfig
from nested_core.pipeline import steps
from nested_core.pipeline.steps import TrainResult
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.metrics_file import read_metrics
from nested_core.training.trainer import Trainer
from tasks.retrying import retried_task, retry_training
from tasks.run_page import create_loss_table

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_LOOKS = 0.5
PERCENT_BETWEEN_UPDATES = 5.0


class PrefectProgress:
    """Log lines now and then and a progress artifact, from a thread of its own.

    Training never waits for the server: where it cannot be reached, only the progress is missing.
    """

    def __init__(self) -> None:
        self._logger = get_run_logger()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._shown_percent = 0.0
        self._logged_at = 0.0

    def start(self, trainer: Trainer) -> None:
        """Follow a trainer from its first step on."""
        context = copy_context()  # the run that artifacts belong to
        self._thread = threading.Thread(
            target=context.run, args=(self._follow, trainer), name="progress", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Show where it ended, and stop."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=SECONDS_BETWEEN_LINES)

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Nothing: what is reported is read from the trainer."""

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Log every evaluation."""
        self._logger.info("iteration %(iteration)d: validation loss %(val_loss).4f", val_info)

    def _follow(self, trainer: Trainer) -> None:
        try:
            artifact: Any = create_progress_artifact(progress=0.0, key="training-progress")
            is_last = False
            while not is_last:
                is_last = self._done.wait(SECONDS_BETWEEN_LOOKS)
                self._log(trainer)
                self._update(artifact, 100.0 * trainer.current_step / trainer.steps)
        except Exception as error:  # of the server or the way to it; training goes on
            self._logger.warning("The progress of training cannot be shown: %s", error)

    def _log(self, trainer: Trainer) -> None:
        loss = trainer.current_train_loss
        if loss is None or time.monotonic() - self._logged_at < SECONDS_BETWEEN_LINES:
            return
        self._logged_at = time.monotonic()
        done, total = trainer.current_step, trainer.steps
        self._logger.info("step %d of %d: train loss %.4f", done, total, loss)

    def _update(self, artifact: UUID, percent: float) -> None:
        is_due = percent - self._shown_percent >= PERCENT_BETWEEN_UPDATES or percent >= 100.0
        if is_due and percent > self._shown_percent:
            self._shown_percent = percent
            update_progress_artifact(artifact_id=artifact, progress=percent)


@retried_task(
    "train",
    "train {config.iters} iterations, tiers {config.nested.frequencies}",
    delays=(5, 30),
    condition=retry_training,
)
def train(
    config: FineTuneConfig, run_dir: Path, watch: Callable[[Trainer], None] | None = None
) -> TrainResult:
    """Train from initial/, or from the last checkpoint; write adapter/ and result.json.

    `watch` is handed the trainer before its first step, so that a signal can stop it.
    """
    progress, run = PrefectProgress(), RunDirectory(run_dir)

    def begin(trainer: Trainer) -> None:
        """Say what it will need, and hand the trainer on."""
        level = logging.INFO if trainer.memory.fits else logging.WARNING
        get_run_logger().log(level, trainer.memory.describe())
        progress.start(trainer)
        if watch is not None:
            watch(trainer)

    try:
        result = steps.train(config, run, progress, begin, on_wait=get_run_logger().info)
    finally:
        progress.finish()
    create_loss_table(read_metrics(run.metrics))
    for flag in result.red_flags:
        get_run_logger().warning("red flag: %s", flag)
    return result
