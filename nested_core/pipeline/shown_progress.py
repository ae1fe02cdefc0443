"""What `finetune` shows of itself in a terminal or a notebook, where nobody else shows it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.pipeline.run_steps import Steps
from nested_core.records.verdict import Verdict
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.duration_format import format_clock
from nested_core.text.foreign_text import escape
from nested_core.text.loss_format import format_loss

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

    def judge(self, config: FineTuneConfig, run: RunDirectory) -> Verdict:
        """Judge, and show the verdict with what has to be known beside it."""
        self._rewrite("gate: judging the adapter ...", is_last=True)
        verdict = super().judge(config, run)
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
