"""The task that trains; tried again, it goes on from the last checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE

from nested_core import pipeline
from nested_core.config import FineTuneConfig
from nested_core.pipeline import TrainResult
from nested_core.run_directory import RunDirectory
from nested_core.training.trainer import Trainer
from tasks.retrying import retry_training

SECONDS_BETWEEN_LINES = 5.0
PERCENT_BETWEEN_UPDATES = 5.0


class PrefectProgress:
    """mlx-lm's callback protocol as log lines now and then and a progress artifact."""

    def __init__(self) -> None:
        self._logger = get_run_logger()
        self._artifact: UUID | None = None
        self._total_steps = 1
        self._shown_percent = 0.0
        self._logged_at = 0.0

    def start(self, trainer: Trainer) -> None:
        """Note how long the run is, and open the artifact."""
        self._total_steps = trainer.method.steps
        made: Any = create_progress_artifact(progress=0.0, key="training-progress")
        self._artifact = made

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Log a line every few seconds; move the artifact every few per cent."""
        if time.monotonic() - self._logged_at >= SECONDS_BETWEEN_LINES:
            self._logged_at = time.monotonic()
            self._logger.info("step %(step)d: train loss %(train_loss).4f", train_info)
        percent = 100.0 * train_info["step"] / self._total_steps
        is_due = percent - self._shown_percent >= PERCENT_BETWEEN_UPDATES or percent >= 100.0
        if self._artifact is not None and is_due:
            self._shown_percent = percent
            update_progress_artifact(artifact_id=self._artifact, progress=percent)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Log every evaluation."""
        self._logger.info("iteration %(iteration)d: validation loss %(val_loss).4f", val_info)


@task(
    name="train",
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=retry_training,
    cache_policy=NO_CACHE,
)
def train(config: FineTuneConfig, run_dir: Path, watch: Callable[[Trainer], None]) -> TrainResult:
    """Train from initial/, or from the last checkpoint; write adapter/ and result.json.

    `watch` is handed the trainer before its first step, so that a signal can stop it.
    """
    progress = PrefectProgress()

    def begin(trainer: Trainer) -> None:
        progress.start(trainer)
        watch(trainer)

    result = pipeline.train(config, RunDirectory(run_dir), progress, begin)
    for flag in result.red_flags:
        get_run_logger().warning("red flag: %s", flag)
    return result
