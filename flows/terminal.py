"""What a person sees: a loss curve while it falls, tables, and one paragraph for an error.

Progress goes to standard error; without a terminal it is a line now and then. All that any command
prints goes through here: text of data, adapters and file names is escaped, and is never markup.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console  # noqa: TID251
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from nested_core.errors import DamagedError
from nested_core.foreign_text import escape
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.strict_files import open_regular

if TYPE_CHECKING:
    from nested_core.optim.tier_counters import TierStats

SECONDS_BETWEEN_LINES = 2.0
POLL_SECONDS = 0.25
SECONDS_BEFORE_PROGRESS = 2.0
CURVE_WIDTH, CURVE_HEIGHT = 64, 12
SMALLEST_LOSS = 1e-6

WIDTH_WITHOUT_TERMINAL = 120

errors = Console(stderr=True, highlight=False, markup=False, emoji=False)


def draw_curve(records: Sequence[dict[str, Any]]) -> str:
    """The losses over the optimizer steps as text, on a logarithmic axis."""
    points = [
        (record.get("step", 0), max(record[key], SMALLEST_LOSS), mark)
        for key, mark in _SERIES
        for record in records
        if _has_number(record, key)
    ]
    if not points:
        return "no loss yet"
    last_step = max(step for step, _, _ in points) or 1
    low, high = min(loss for _, loss, _ in points), max(loss for _, loss, _ in points)
    rows = [[" "] * CURVE_WIDTH for _ in range(CURVE_HEIGHT)]
    for step, loss, mark in points:
        share = math.log(loss / low) / math.log(high / low) if high > low else 0.0
        row = round((1 - share) * (CURVE_HEIGHT - 1))
        rows[row][round(step / last_step * (CURVE_WIDTH - 1))] = mark
    labels = {0: f"{high:8.3f}", CURVE_HEIGHT - 1: f"{low:8.3f}"}
    lines = [f"{labels.get(i, ''):>8} |{''.join(row).rstrip()}" for i, row in enumerate(rows)]
    axis = f"{'':8} +{'-' * CURVE_WIDTH}\n{'':10}0{f'step {last_step}':>{CURVE_WIDTH - 1}}"
    return "\n".join([*lines, axis, f"{'':10}· training loss   o validation loss   (logarithmic)"])


_SERIES = (("loss", "·"), ("val_loss", "o"))


def _has_number(record: dict[str, Any], key: str) -> bool:
    return record.get(key) is not None


@contextmanager
def showing_metrics(metrics: Path) -> Iterator[None]:
    """Show what is appended to a run's metrics.jsonl while the block runs."""
    watcher = _MetricsFollower(metrics)
    watcher.start()
    try:
        yield
    finally:
        watcher.finish()


class _MetricsFollower(threading.Thread):
    """Follows metrics.jsonl: what is shown is what is on disk."""

    def __init__(self, metrics: Path) -> None:
        super().__init__(daemon=True)
        self._metrics = metrics
        self._records: list[dict[str, Any]] = []
        self._inode = -1
        self._offset = 0
        self._done = threading.Event()
        self._printed_at = 0.0
        self._has_news = False

    def run(self) -> None:
        """Poll until told to finish; one last look comes after that."""
        if not errors.is_terminal:
            self._follow(self._print_line)
            return
        with Live(console=errors, refresh_per_second=4, transient=True) as live:
            self._follow(lambda: live.update(Text(draw_curve(self._records))))

    def finish(self) -> None:
        """Show the rest and stop."""
        self._done.set()
        self.join()

    def _follow(self, show: Any) -> None:
        is_last = False
        while not is_last:
            is_last = self._done.wait(POLL_SECONDS)
            self._read()
            if self._has_news:
                show()

    def _read(self) -> None:
        """Take in the whole lines that were appended; a file cut back is read from its start.

        It is another file then, which may have grown beyond the old one since it was looked at.
        """
        try:
            with open_regular(self._metrics) as (file, _):
                inode, content = os.fstat(file.fileno()).st_ino, file.read()
        except (DamagedError, OSError):  # training says what is wrong; here is only shown
            return
        if inode != self._inode or len(content) < self._offset:
            self._inode = inode
            self._offset = 0
            self._records = []
            self._has_news = False
        whole = content[self._offset : content.rfind(b"\n") + 1]
        self._offset += len(whole)
        new = [record for line in whole.splitlines() if (record := _record_or_none(line))]
        self._records += new
        self._has_news = self._has_news or bool(new)

    def _print_line(self) -> None:
        if time.monotonic() - self._printed_at < SECONDS_BETWEEN_LINES and not self._done.is_set():
            return
        self._printed_at = time.monotonic()
        self._has_news = False
        record = self._records[-1]
        losses = [f"{label} {_format_loss(record[key])}" for key, label in _LABELS if key in record]
        print_progress(f"step {record.get('step', 0)}: {', '.join(losses)}")


def _record_or_none(line: bytes) -> dict[str, Any] | None:
    from nested_core.training.metrics_file import parse_record

    try:
        return parse_record(line)
    except ValueError:  # a damaged line, which training leaves out and names
        return None


_LABELS = (("loss", "training loss"), ("val_loss", "validation loss"))


def _format_loss(loss: float | None) -> str:
    """JSON has no NaN: metrics.jsonl holds null in its place."""
    return "not finite" if loss is None else f"{loss:.4f}"


class ProgressLine:
    """For work in known amounts: a line that is rewritten, or without a terminal now and then one.

    Nothing is shown of work that takes less than SECONDS_BEFORE_PROGRESS.
    """

    def __init__(self) -> None:
        self._began = self._called_at = time.monotonic()
        self._shown_at = 0.0
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of `what` are done."""
        now = time.monotonic()
        if what != self._what:
            self._began = self._called_at  # the work before this has ended
            self._what = what
        self._called_at = now
        every = POLL_SECONDS if errors.is_terminal else SECONDS_BETWEEN_LINES
        is_due = now - self._shown_at >= every or (done == total and self._shown_at > self._began)
        if now - self._began < SECONDS_BEFORE_PROGRESS or not is_due:
            return
        self._shown_at = now
        left = (now - self._began) / done * (total - done)
        text = f"{what}: {done / total:.0%}" + (f", {left:.0f} s left" if done < total else "")
        if errors.is_terminal:
            errors.print(f"\r{text:<40}", end="\n" if done == total else "")
        else:
            errors.print(text, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "") -> None:
    """A table on standard output; wide enough not to fold where there is no terminal."""
    console = output_console(WIDTH_WITHOUT_TERMINAL)
    headers = [Column(Text(escape(name)), overflow="fold") for name in columns]
    table = Table(*headers, title=Text(escape(title)) if title else None, title_justify="left")
    for row in rows:
        table.add_row(*map(_format_cell, row))
    console.print(table)


def output_console(width: int) -> Console:
    """A console for standard output, without markup; `width` holds where it is no terminal."""
    width_or_none = None if sys.stdout.isatty() else width
    return Console(highlight=False, markup=False, emoji=False, width=width_or_none)


def _format_cell(value: Any) -> Text:
    """A value as a person reads it: four digits of a number, `-` for none."""
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, float):
        return Text(f"{value:.4g}")
    return Text("-" if value is None else escape(str(value)))


def print_tiers(verdict: dict[str, Any]) -> None:
    """The tier table of a verdict: frequencies, updates expected and applied, change."""
    rows = []
    for tier in verdict["tiers"]:
        own = [t["relative_delta"] for t in verdict["tensors"] if t["tier"] == tier["tier"]]
        deltas = [delta for delta in own if delta is not None]
        change = f"{sum(deltas) / len(deltas):.3f}" if deltas else "-"
        changed = f"{tier['changed']} of {tier['tensors']}"
        counts = (tier["expected_updates"], tier["applied_updates"], tier["skipped_updates"])
        rows.append((tier["tier"], f"every {tier['frequency']}", changed, *counts, change))
    columns = ("tier", "updated", "tensors changed", "expected", "applied", "skipped", "change")
    print_table(columns, rows, title="Tiers up to the judged step (change: mean relative)")


def describe_tiers(stats: Sequence[TierStats]) -> str:
    """What each tier holds and how often it is updated, on one line."""
    return "; ".join(
        f"tier {s.tier} (every {'step' if s.frequency == 1 else f'{s.frequency} steps'}): "
        f"{s.tensors} tensors, {s.parameters:,} parameters"
        for s in stats
    )


def print_json(document: Any) -> None:
    """Exactly one JSON document on standard output: ASCII, and null for what is not finite."""
    if sys.__stdout__ is not None:
        text = json.dumps(finite_or_none(document), indent=2, default=str, allow_nan=False)
        print(text, file=sys.__stdout__)  # noqa: T201


def print_line(text: str) -> None:
    """A line of a command's result on standard output."""
    print(escape(text))  # noqa: T201


def print_progress(*lines: str) -> None:
    """A line of progress, or the lines of a paragraph, on standard error."""
    for line in lines:
        errors.print(Text(escape(line)), soft_wrap=True)
