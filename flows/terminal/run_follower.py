"""Shows work from a thread of its own: a run, as lines or as the room live draws it, or stages.

Stages are lines on standard error that say what a command is at, whose length is not known.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.terminal.console import POLL_SECONDS, SECONDS_BETWEEN_LINES, can_redraw, print_progress
from nested_core import seams
from nested_core.errors import DamagedError, MissingFileError
from nested_core.records.metrics import describe_tasks
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import read_json_object
from nested_core.text.duration_format import format_clock
from nested_core.text.foreign_text import escape
from nested_core.text.loss_format import format_loss
from nested_core.text.stages import receiving_stages
from nested_core.training.reports.run_progress import RunProgress

SECONDS_BEFORE_FIRST_LINE = 0.5  # after Python's own start: two seconds in all
SECONDS_BETWEEN_REPEATS = 10.0  # of a stage that lasts
LINE_GAP_SHARE_OF_ELAPSED_TIME = 1 / 60  # of the time so far: a long run prints fewer lines an hour
MAX_SECONDS_BETWEEN_LINES = 60.0


@contextmanager
def showing_stages(first: str) -> Iterator[None]:
    """Show what the block logs to `nested_core.text.stages`, a line at once and then now and then.

    first: the stage until the block logs one. A stage that lasts is shown again with the seconds
    since the block began, so that slow work is told from work that hangs.
    """
    lines = _StageLines(first)
    with receiving_stages(lines.begin_stage):
        lines.start()
        try:
            yield
        finally:
            lines.done.set()
            lines.join()


class _StageLines(threading.Thread):
    """Prints the stage that the work is at, from a thread of its own."""

    def __init__(self, first: str) -> None:
        super().__init__(name="stage-lines", daemon=True)
        self.done = threading.Event()
        self._began = time.monotonic()
        self._stage = first

    def begin_stage(self, stage: str) -> None:
        """The work is at another stage now."""
        self._stage = stage

    def run(self) -> None:
        """Print until the work is done."""
        printed, due = "", self._began + SECONDS_BEFORE_FIRST_LINE
        while not self.done.wait(POLL_SECONDS):
            stage, now = self._stage, time.monotonic()
            if now < due:
                continue
            print_progress(stage if stage != printed else f"{stage} ({now - self._began:.0f} s)")
            printed = stage
            due = now + SECONDS_BETWEEN_REPEATS


@contextmanager
def showing_run(run: RunDirectory) -> Iterator[None]:
    """Show what a run reports while the block trains and judges it; the last screen stays."""
    follower = RunFollower(run)
    with receiving_stages(follower.add_stage):
        follower.start()
        try:
            yield
        finally:
            follower.finish()


@dataclass(frozen=True)
class LiveView:
    """A room's drawings of a run in a terminal.

    draw: draws a run until an event says that it is done. The lock is held while the view changes.
    draw_curve: returns the losses of the records of metrics.jsonl as a curve of characters.
    """

    draw: Callable[[RunProgress, RunDirectory, threading.Event, threading.RLock], None]
    draw_curve: Callable[[Sequence[dict[str, object]]], str]


class RunFollower(threading.Thread):
    """Follows a run: what is shown of its training is what plan.json and metrics.jsonl hold.

    What follows training, such as the steps of the gate, is heard from `nested_core.text.stages`.
    """

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(name="follower", daemon=True)
        self.view = RunProgress(run)
        self._run = run
        self._can_redraw = can_redraw() and seams.is_there("live")
        self._done = threading.Event()
        self._lock = threading.RLock()

        # The last record that was printed as a line
        self.view.read_metrics()
        self._printed = self.view.last_record if self.view.records else None
        self._printed_at = 0.0
        self._has_offer = False
        self._stage_printed_at = 0.0

    def run(self) -> None:
        """Poll until told to finish; one last look comes after that."""
        if self._can_redraw:
            view = seams.load_only(LiveView, "the live view")
            view.draw(self.view, self._run, self._done, self._lock)
            return
        while not self._done.wait(POLL_SECONDS):
            with self._lock:
                self.view.read()
                self._print_line(is_last=False)
                self._repeat_stage()

    def finish(self) -> None:
        """Show the rest and how it ended, and stop."""
        self._done.set()
        self.join()
        if not self._can_redraw:
            with self._lock:
                self._print_last_lines()

    def add_stage(self, name: str) -> None:
        """Show a step that begins now; what is said before training begins is a line alone."""
        with self._lock:
            if not self.view.has_begun or not self._can_redraw:
                self._print_last_lines()
                print_progress(name)
                self._stage_printed_at = time.monotonic()
            if self.view.has_begun:
                self.view.read()
                self.view.stages.append((name, self.view.seconds))

    # As lines

    def _print_line(self, *, is_last: bool) -> None:
        """Print the last record if it is new, and an evaluation or the last line long ago."""
        if not self.view.records or self.view.last_record == self._printed:
            return
        pause = min(
            max(SECONDS_BETWEEN_LINES, LINE_GAP_SHARE_OF_ELAPSED_TIME * self.view.seconds),
            MAX_SECONDS_BETWEEN_LINES,
        )
        is_due = is_last or "val_loss" in self.view.last_record
        if not is_due and time.monotonic() - self._printed_at < pause:
            return
        self._printed_at = time.monotonic()
        self._printed = self.view.last_record
        print_progress(format_line(self.view))
        for line in self.view.describe_samples() if "samples" in self.view.last_record else ():
            print_progress(f"  {line}")

    def _repeat_stage(self) -> None:
        """Print a stage after training that lasts again, with its seconds."""
        now = time.monotonic()
        if self._has_offer and now - self._stage_printed_at >= SECONDS_BETWEEN_REPEATS:
            name, began = self.view.stages[-1]
            print_progress(f"{name} ({self.view.seconds - began:.0f} s)")
            self._stage_printed_at = now

    def _print_last_lines(self) -> None:
        """Print the last record, and once training is done which adapter it offers."""
        self.view.read()
        self._print_line(is_last=True)
        result = read_object_or_empty(self._run.result)
        if not self.view.has_begun or not result or self._has_offer:
            return
        self._has_offer = True
        parts = (
            self.view.describe_length(result),
            format_clock(self.view.training_seconds),
            self.view.describe_memory(),
            self.view.describe_offered_adapter(result["adapter_step"]),
        )
        print_progress(", ".join(filter(None, parts)))


def read_object_or_empty(path: Path) -> dict[str, Any]:
    """A JSON file of the run; empty where there is none or it is damaged, which others report."""
    try:
        return read_json_object(path)
    except (DamagedError, MissingFileError, OSError):
        return {}


def format_line(view: RunProgress) -> str:
    """The last record on one line, for a log: losses, speed, memory, and the time that is left."""
    record = view.last_record
    parts = []
    if "loss" in record:
        parts.append(f"training loss {format_loss(record['loss'])}")
    if "val_loss" in record:
        text = f"validation loss {format_loss(record['val_loss'])}"
        if view.plan is not None and view.plan.validation_file is not None:
            text += f" ({view.plan.describe_validation()})"
        parts.append(text)
    if answers := describe_tasks(record):
        parts.append(escape(answers))
    if "loss" in record:
        parts += filter(None, (view.describe_speed(), view.describe_memory()))
    if view.plan is not None and record["step"] > 0:
        parts.append(view.describe_position())
        left = view.seconds_left()
        if left is not None and record["step"] < view.plan.steps:
            parts.append(f"about {format_clock(left)} left")
    return f"step {record.get('step', 0)}: {', '.join(parts)}"
