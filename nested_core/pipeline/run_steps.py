"""The steps of `finetune`, and what its caller is told on the way: both can be overridden."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.pipeline import steps
from nested_core.pipeline.continual import describe_starting_adapter
from nested_core.pipeline.publishing import register_run
from nested_core.pipeline.steps import TrainResult
from nested_core.records.verdict import Verdict
from nested_core.registry import Promotion
from nested_core.registry.promotion_policy import promote_by_policy
from nested_core.registry.serving_status import await_configured
from nested_core.storage.run_directory import RunDirectory


class Steps:
    """The steps of `finetune`, and what its caller is told: override what is to be otherwise."""

    def on_message(self, message: str) -> None:
        """Called with a line for a person: warnings about the data, what training starts from."""

    def on_data_progress(self, what: str, done: int, total: int) -> None:
        """Called while the data is read and tokenised: `done` of `total` parts of `what`."""

    def on_training_start(self, trainer: Any) -> None:
        """Called with the trainer, or the group of processes, before its first step.

        `trainer.stop_training()` stops it gracefully, from any thread.
        """

    def on_step(self, step: int, steps: int) -> None:
        """Called after each optimizer step, from 1, of `steps`; not where several processes train.

        What it raises ends the run as an error; a stop is `trainer.stop_training()`.
        """

    def on_report(self, figures: Mapping[str, Any]) -> None:
        """Called with each report and evaluation, as mlx-lm's callbacks are.

        `figures` has `iteration`; of a report `step`, `train_loss`, `learning_rate`,
        `tokens_per_second`, `trained_tokens` and `peak_memory` (GB), of an evaluation `val_loss`
        and `val_time` (seconds). Losses are in nats a token.
        """

    def begin(self, config: FineTuneConfig, run: RunDirectory, *, resume: bool) -> None:
        """Write or compare the run's configuration."""
        steps.write_run_config(config, run, resume=resume)

    def validate(self, config: FineTuneConfig, run: RunDirectory) -> None:
        """Judge the data set; DatasetError where it has an error."""
        report = steps.validate(config, run, self.on_data_progress)
        if warnings := report.describe_warnings():
            self.on_message(f"{warnings} (all: {run.dataset})")

    def load(self, config: FineTuneConfig, run: RunDirectory) -> None:
        """Write the initial adapter and the tier of each tensor."""
        steps.write_initial_adapter_and_tiers(config, run, on_wait=self.on_message)
        if note := describe_starting_adapter(config, run):
            self.on_message(note)

    def train(self, config: FineTuneConfig, run: RunDirectory) -> TrainResult:
        """Train to the end; TrainingStopped where somebody asked to stop."""

        def begin(trainer: Any) -> None:
            """Have the trainer tell of each step."""
            trainer.on_step = self.on_step
            self.on_training_start(trainer)

        return steps.train(config, run, _ReportCallback(self), begin, self.on_message)

    def judge(self, config: FineTuneConfig, run: RunDirectory) -> Verdict:
        """Judge the adapter; GateRejected where it does not pass."""
        return steps.judge(config, run, on_wait=self.on_message)

    def measure_test(self, config: FineTuneConfig, run: RunDirectory) -> float:
        """The loss of the judged adapter on test.jsonl."""
        return steps.measure_test(config, run, on_wait=self.on_message)

    def register(self, config: FineTuneConfig, run: RunDirectory, champion: str | None) -> str:
        """Add the adapter to the registry; return its version."""
        return register_run(config, run, champion)

    def promote(self, config: FineTuneConfig, version: str, champion: str | None) -> str:
        """Promote the version as `registry.promote` says; return what became of it."""
        done = promote_by_policy(config.registry, version, champion)
        if isinstance(done, Promotion) and done.outcome == "promoted":
            for sentence in await_configured(config.registry, config.serve.urls, version):
                self.on_message(sentence)
        return done if isinstance(done, str) else done.outcome


Hooks = Steps  # its name in programs that were written before


class _ReportCallback:
    """mlx-lm's callback protocol, handed on to `Steps.on_report`."""

    def __init__(self, hooks: Steps) -> None:
        self._hooks = hooks

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """A report."""
        self._hooks.on_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """An evaluation."""
        self._hooks.on_report(val_info)
