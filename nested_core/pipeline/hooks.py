"""The steps of `finetune` and its progress callbacks; both can be overridden."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.data.lines.example_parsing import MLX_LM_FORMATS
from nested_core.measure.losses.loss_on_test_set import LossOnTestSet
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
    """The steps of `finetune` and its progress callbacks; override a method to change it.

    The argument `session` keeps objects in memory from one step to the next, such as the base
    model.
    """

    def on_message(self, message: str) -> None:
        """Called with a message for the user, such as a warning about the data."""

    def on_data_progress(self, what: str, done: int, total: int) -> None:
        """Called while the data is read and tokenised: `done` of `total` parts of `what`."""

    def on_training_start(self, trainer: Any) -> None:
        """Called with the trainer, or the group of processes, before its first step.

        `trainer.stop_training()` stops it gracefully, from any thread.
        """

    def on_step(self, step: int, steps: int) -> None:
        """Called after each optimizer step with its number, from 1, and the number of steps.

        Not called if several processes train. An exception raised here ends the run as an error;
        call `trainer.stop_training()` to stop the run gracefully.
        """

    def on_report(self, figures: Mapping[str, object]) -> None:
        """Called with each report and evaluation, as mlx-lm's callbacks are.

        `figures` has `iteration`; of a report `step`, `train_loss`, `learning_rate`,
        `tokens_per_second`, `trained_tokens` and `peak_memory` (GB), of an evaluation `val_loss`
        and `val_time` (seconds). Losses are in nats/token.
        """

    def begin(self, config: FineTuneConfig, run: RunDirectory, *, resume: bool) -> None:
        """Write the run's configuration, or compare it with the recorded one on resume."""
        steps.write_run_config(config, run, resume=resume)

    def validate(self, config: FineTuneConfig, run: RunDirectory) -> None:
        """Validate the data set and report its warnings; DatasetError if it has an error."""
        report = steps.validate(config, run, self.on_data_progress)
        for stats in report.splits.values():
            if stats.format not in MLX_LM_FORMATS or stats.delimiters:
                self.on_message(stats.describe_format())
        if warnings := report.describe_warnings():
            self.on_message(warnings)
        for sentence in steps.describe_earlier_examples(config, run):
            self.on_message(sentence)

    def load(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> None:
        """Write the initial adapter, and the tier that each of its tensors belongs to."""
        steps.write_initial_adapter_and_tiers(config, run, self.on_message, session=session)
        if note := describe_starting_adapter(config, run):
            self.on_message(note)

    def train(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> TrainResult:
        """Train to the last step; TrainingStopped if a stop was requested before."""

        def begin(trainer: Any) -> None:
            """Attach this object's callbacks to the trainer before its first step."""
            trainer.on_step = self.on_step
            self.on_training_start(trainer)

        # An object of the form of mlx-lm's training callbacks
        report = self.on_report
        callback = SimpleNamespace(on_train_loss_report=report, on_val_loss_report=report)
        return steps.train(config, run, callback, begin, self.on_message, session=session)

    def judge(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> Verdict:
        """Run the gate on the trained adapter; GateRejected if it does not pass."""
        return steps.judge(config, run, self.on_message, session=session)

    def measure_test(
        self, config: FineTuneConfig, run: RunDirectory, session: Session
    ) -> LossOnTestSet:
        """Measure the loss of the judged adapter on test.jsonl, in nats/token."""
        return steps.measure_test(config, run, self.on_message, session=session)

    def register(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> Decision:
        """Register the judged adapter, and promote it if `registry.promote` allows.

        Returns the decision on its promotion.
        """
        judged = find_judged_run(run, session)
        return register_run(config, judged, judged.verdict.rival)


SECONDS_BETWEEN_LINES = 0.25
LINE_WIDTH = 100


def can_show_progress() -> bool:
    """Return whether standard error can rewrite a line: a terminal, or a notebook's cell."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class ShownProgress(Steps):
    """Progress on standard error, as one line that is rewritten in place.

    The line shows the reading of the data, then steps, losses and the remaining time.
    """

    def __init__(self) -> None:
        """Create it with nothing shown yet."""
        self._losses: dict[str, float | None] = {}
        self._began: tuple[int, float] | None = None  # the first step that was seen, and when
        self._shown_at = 0.0
        self._has_open_line = False

    def on_message(self, message: str) -> None:
        """Write the message on a separate line, which stays."""
        self._write(escape(message), ends=True)

    def on_data_progress(self, what: str, done: int, total: int) -> None:
        """Show the percentage of the data that has been read."""
        self._rewrite(f"{what}: {done / total:.0%}")

    def on_report(self, figures: Mapping[str, Any]) -> None:
        """Remember the newest losses; the next `on_step` shows them."""
        names = {"train_loss": "training loss", "val_loss": "validation loss"}
        self._losses |= {text: figures[key] for key, text in names.items() if key in figures}

    def on_step(self, step: int, steps: int) -> None:
        """Show the step, the newest losses and an estimate of the remaining time."""
        now = time.monotonic()
        if self._began is None:
            self._began = (step, now)
        first, began = self._began
        parts = [f"train {step / steps:4.0%}, step {step:,} of {steps:,}"]
        parts += [f"{name} {format_loss(loss)}" for name, loss in self._losses.items()]
        if step > first:
            remaining_seconds = (now - began) / (step - first) * (steps - step)
            parts.append(f"about {format_clock(remaining_seconds)} left")
        self._rewrite(", ".join(parts), is_last=step == steps)

    def judge(self, config: FineTuneConfig, run: RunDirectory, session: Session) -> Verdict:
        """Run the gate, then show the verdict and its notes."""
        self._rewrite("gate: evaluating the adapter ...", is_last=True)
        verdict = super().judge(config, run, session)
        for line in (verdict.summary(), *verdict.notes()):
            self.on_message(line)
        return verdict

    def _rewrite(self, text: str, *, is_last: bool = False) -> None:
        """Replace the open line by `text`, at most once in SECONDS_BETWEEN_LINES.

        With `is_last` the text is always written.
        """
        now = time.monotonic()
        if is_last or now - self._shown_at >= SECONDS_BETWEEN_LINES:
            self._shown_at = now
            self._write(escape(text), ends=False)

    def _write(self, text: str, *, ends: bool) -> None:
        """Write `text` over the open line; `ends` finishes the line so that it stays."""
        start = "\r" if self._has_open_line else ""
        padded = text.ljust(LINE_WIDTH) if self._has_open_line or not ends else text
        end = "\n" if ends else ""
        sys.stderr.write(f"{start}{padded}{end}")
        sys.stderr.flush()
        self._has_open_line = not ends
