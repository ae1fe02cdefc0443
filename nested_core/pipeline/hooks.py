"""The steps of `finetune`, and what its caller is told on the way: both can be overridden."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.data.lines.example_parsing import MLX_LM_FORMATS
from nested_core.models.session import Session
from nested_core.pipeline import steps
from nested_core.pipeline.continual import describe_starting_adapter
from nested_core.pipeline.publishing import find_judged_run, register_run
from nested_core.records.result import TrainResult
from nested_core.records.verdict import Verdict
from nested_core.registry import Decision
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.duration_format import format_clock
from nested_core.text.foreign_text import escape
from nested_core.text.loss_format import format_loss


class Steps:
    """The steps of `finetune`, and what its caller gets to know: override what is to differ.

    `session` holds what a step leaves in memory for the next, such as the base model.
    """

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
        and `val_time` (seconds). Losses are in nats/token.
        """

    def begin(self, config: FineTuneConfig, run: RunDirectory, *, resume: bool) -> None:
        """Write or compare the run's configuration."""
        steps.write_run_config(config, run, resume=resume)

    def validate(self, config: FineTuneConfig, run: RunDirectory) -> None:
        """Judge the data set; DatasetError where it has an error."""
        report = steps.validate(config, run, self.on_data_progress)
        for stats in report.splits.values():
            if stats.format not in MLX_LM_FORMATS or stats.delimiters:
                self.on_message(stats.describe_format())
        if warnings := report.describe_warnings():
            self.on_message(warnings)
        for sentence in steps.describe_earlier_examples(config, run):
            self.on_message(sentence)

    def load(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> None:
        """Write the initial adapter and the tier of each tensor."""
        steps.write_initial_adapter_and_tiers(config, run, self.on_message, session=session)
        if note := describe_starting_adapter(config, run):
            self.on_message(note)

    def train(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> TrainResult:
        """Train to the end; TrainingStopped where somebody asked to stop."""

        def begin(trainer: Any) -> None:
            """Have the trainer tell of each step."""
            trainer.on_step = self.on_step
            self.on_training_start(trainer)

        callback = _ReportCallback(self)
        return steps.train(config, run, callback, begin, self.on_message, session=session)

    def judge(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> Verdict:
        """Judge the adapter; GateRejected where it does not pass."""
        return steps.judge(config, run, self.on_message, session=session)

    def measure_test(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> float:
        """The loss of the judged adapter on test.jsonl."""
        return steps.measure_test(config, run, self.on_message, session=session)

    def register(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> Decision:
        """Add the judged adapter to the registry, and promote it as `registry.promote` says.

        Returns what became of the version.
        """
        judged = find_judged_run(run, session)
        return register_run(config, judged, judged.verdict.rival)


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


SECONDS_BETWEEN_LINES = 0.25
LINE_WIDTH = 100


def can_show_progress() -> bool:
    """Whether standard error is a terminal or a notebook's cell, where a line can be rewritten."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class ShownProgress(Steps):
    """One line that is rewritten: what is read, then steps, losses and the time that is left."""

    def __init__(self) -> None:
        self._losses: dict[str, float | None] = {}
        self._began: tuple[int, float] | None = None  # the first step that was seen, and when
        self._shown_at = 0.0
        self._has_open_line = False

    def on_message(self, message: str) -> None:
        """A line of its own."""
        self._write(escape(message), ends=True)

    def on_data_progress(self, what: str, done: int, total: int) -> None:
        """How much of the data is read."""
        self._rewrite(f"{what}: {done / total:.0%}")

    def on_report(self, figures: Mapping[str, Any]) -> None:
        """Keep the losses for the next line."""
        names = {"train_loss": "training loss", "val_loss": "validation loss"}
        self._losses |= {text: figures[key] for key, text in names.items() if key in figures}

    def on_step(self, step: int, steps: int) -> None:
        """The position, the last losses, and how long it will take."""
        now = time.monotonic()
        if self._began is None:
            self._began = (step, now)
        first, began = self._began
        parts = [f"train {step / steps:4.0%}, step {step:,} of {steps:,}"]
        parts += [f"{name} {format_loss(loss)}" for name, loss in self._losses.items()]
        if step > first:
            left = (now - began) / (step - first) * (steps - step)
            parts.append(f"about {format_clock(left)} left")
        self._rewrite(", ".join(parts), is_last=step == steps)

    def judge(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> Verdict:
        """Judge, and show the verdict with what has to be known beside it."""
        self._rewrite("gate: evaluating the adapter ...", is_last=True)
        verdict = super().judge(config, run, session)
        for line in (verdict.summary(), *verdict.notes()):
            self.on_message(line)
        return verdict

    def _rewrite(self, text: str, *, is_last: bool = False) -> None:
        """Put the text in place of the open line, now and then."""
        now = time.monotonic()
        if is_last or now - self._shown_at >= SECONDS_BETWEEN_LINES:
            self._shown_at = now
            self._write(escape(text), ends=False)

    def _write(self, text: str, *, ends: bool) -> None:
        start = "\r" if self._has_open_line else ""
        padded = text.ljust(LINE_WIDTH) if self._has_open_line or not ends else text
        end = "\n" if ends else ""
        sys.stderr.write(f"{start}{padded}{end}")
        sys.stderr.flush()
        self._has_open_line = not ends
