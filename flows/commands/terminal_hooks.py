"""What `nested-tune train` shows of a fine-tune, and how a signal stops it."""

from __future__ import annotations

from typing import Any

from flows.stop_signals import Stopper
from flows.terminal import ProgressLine, describe_tiers, print_progress
from nested_core.config.schema import FineTuneConfig
from nested_core.pipeline.finetune import Hooks
from nested_core.pipeline.steps import TrainResult
from nested_core.storage.run_directory import RunDirectory


class TerminalHooks(Hooks):
    """Messages, progress and the loss curve on standard error; signals go to the trainer."""

    def __init__(self, stopper: Stopper) -> None:
        self._stopper = stopper
        self._progress = ProgressLine()

    def on_message(self, message: str) -> None:
        """Show a line."""
        print_progress(message)

    def on_data_progress(self, what: str, done: int, total: int) -> None:
        """Show how much of the data is read and tokenised."""
        self._progress(what, done, total)

    def on_training_start(self, trainer: Any) -> None:
        """Let signals stop the trainer; show its tiers and the memory that it will need."""
        self._stopper.watch(trainer)
        print_progress(describe_tiers(trainer.tier_stats()))
        print_progress(("" if trainer.memory.fits else "warning: ") + trainer.memory.describe())

    def train(self, config: FineTuneConfig, run: RunDirectory) -> TrainResult:
        """Train; then signals end the process where it is."""
        result = super().train(config, run)
        self._stopper.release()
        return result
