"""The task that trains; tried again, it goes on from the last checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from prefect import get_run_logger

from nested_core.config.schema import FineTuneConfig
from nested_core.pipeline import steps
from nested_core.pipeline.steps import TrainResult
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.trainer import Trainer
from tasks.retrying import retried_task, retry_on_transient_or_memory_error
from tasks.training_progress import PrefectProgress


@retried_task(
    "train",
    "train {config.length}, tiers {config.nested.frequencies}",
    delays=(5, 30),
    condition=retry_on_transient_or_memory_error,
)
def train(
    config: FineTuneConfig, run_dir: Path, watch: Callable[[Trainer], None] | None = None
) -> TrainResult:
    """Train from initial/, or from the last checkpoint; write adapter/ and result.json.

    `watch` is handed the trainer before its first step, so that a signal can stop it.
    """
    run = RunDirectory(run_dir)
    progress = PrefectProgress(config, run)

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
    for flag in result.red_flags:
        get_run_logger().warning("red flag: %s", flag)
    return result
