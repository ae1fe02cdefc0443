"""What `nested-tune train` shows of a fine-tune, and how a signal stops it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flows.process.stop_signals import Stopper
from flows.terminal.console import ProgressLine, describe_tiers, print_progress
from nested_core.config.schema import FineTuneConfig
from nested_core.models.session import Session
from nested_core.pipeline.hooks import Steps
from nested_core.records.answers import SampleAnswers, read_sample_answers
from nested_core.records.result import TrainResult
from nested_core.records.verdict import Verdict
from nested_core.storage.run_directory import RunDirectory


class TerminalSteps(Steps):
    """Messages, progress and the loss curve on standard error; signals go to the trainer."""

    def __init__(self, stopper: Stopper) -> None:
        """`stopper` hands signals to the trainer while there is one."""
        self._stopper = stopper
        self._progress = ProgressLine()
        self.sample_answers: Sequence[SampleAnswers] = ()

    def on_message(self, message: str) -> None:
        """Show a line."""
        print_progress(message)

    def on_data_progress(self, what: str, done: int, total: int) -> None:
        """Show how much of the data is read and tokenised."""
        self._progress(what, done, total)

    def on_training_start(self, trainer: Any) -> None:
        """Let signals stop the trainer; show its tiers and the memory that it will need."""
        self._stopper.direct_signals_to(trainer)
        print_progress(describe_tiers(trainer.tier_stats()))
        print_progress(("" if trainer.memory.fits else "warning: ") + trainer.memory.describe())

    def train(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> TrainResult:
        """Train; then signals end the process where it is."""
        result = super().train(config, run, session)
        self._stopper.release_trainer()
        return result

    def judge(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> Verdict:
        """Judge, and keep what base and adapter answered to a few prompts."""
        try:
            return super().judge(config, run, session)
        finally:
            if run.sample_answers.exists():
                self.sample_answers = read_sample_answers(run.sample_answers)
