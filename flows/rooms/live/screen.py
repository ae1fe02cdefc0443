"""The screen of a run that goes on; everything comes from a `RunProgress`.

The losses are drawn as a curve of characters.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text

from nested_core.records.plan import describe_last_losses
from nested_core.text.duration_format import format_clock
from nested_core.text.foreign_text import escape
from nested_core.text.loss_format import format_loss
from nested_core.training.reports.run_progress import RunProgress

SMALLEST_LOSS = 1e-6
LABEL_WIDTH = 8
TRAINING_MARK, VALIDATION_MARK = "·", "o"
LEGEND = f"{TRAINING_MARK} training loss   {VALIDATION_MARK} validation loss"
_SERIES = (("loss", TRAINING_MARK), ("val_loss", VALIDATION_MARK))  # the later is drawn on top


def draw_curve(
    records: Sequence[dict[str, Any]],
    *,
    width: int = 64,
    height: int = 12,
    last_step: int | None = None,
) -> str:
    """Draw training and validation losses of metrics.jsonl, on a logarithmic axis.

    width, height: of the plot in characters, without its axes.
    last_step: where the axis of steps ends; by default at the last record.
    """
    points = [
        (record.get("step", 0), max(record[key], SMALLEST_LOSS), mark)
        for key, mark in _SERIES
        for record in records
        if record.get(key) is not None
    ]
    if not points:
        return "no loss yet"
    last_step = max(last_step or 1, *(step for step, _, _ in points))
    low = min(loss for _, loss, _ in points)
    high = max(loss for _, loss, _ in points)
    rows = [[" "] * width for _ in range(height)]
    for step, loss, mark in points:
        share = math.log(loss / low) / math.log(high / low) if high > low else 1.0
        row = round((1 - share) * (height - 1))
        rows[row][round(step / last_step * (width - 1))] = mark
    labels = {0: format_loss(high)}
    if high > low:
        labels[height - 1] = format_loss(low)
    lines = [
        f"{labels.get(i, ''):>{LABEL_WIDTH}} |{''.join(row).rstrip()}" for i, row in enumerate(rows)
    ]
    margin = " " * LABEL_WIDTH
    axis = f"{margin} +{'-' * width}\n{margin}  0{f'step {last_step:,}':>{width - 1}}"
    return "\n".join([*lines, axis, f"{margin}  {LEGEND}   (logarithmic)"])


MIN_PLOT_HEIGHT = 4
MIN_FINAL_PLOT_HEIGHT = 8
MAX_PLOT_HEIGHT = 24
BAR_PARTS = "▏▎▍▌▋▊▉"
MAX_SHOWN_SAMPLES = 3


def draw_bar(share: float, width: int) -> str:
    """Return a bar that is filled to a share, in eighths of a character."""
    whole, rest = divmod(int(min(max(share, 0.0), 1.0) * width * 8), 8)
    part = BAR_PARTS[rest - 1] if rest else ""
    return f"{'█' * whole}{part}".ljust(width, "░")


def draw_screen(view: RunProgress, width: int, height: int) -> Text:
    """Draw the view for a terminal of `width` columns and `height` lines, one left free.

    What does not fit is left out: first samples, then the plot gets smaller. The last screen, with
    an outcome, may be longer.
    """
    head = _head_lines(view, width)
    body = _body_lines(view, width)
    axes = 3
    samples: list[Text] = []
    for text in [*view.describe_questions(), *view.describe_samples()[:MAX_SHOWN_SAMPLES]]:
        if len(head) + len(body) + len(samples) + 1 + axes + MIN_PLOT_HEIGHT < height:
            samples.append(Text(text, "dim"))
    room = height - 1 - len(head) - len(body) - len(samples) - axes
    if view.outcome:  # the last screen may scroll
        room = max(room, MIN_FINAL_PLOT_HEIGHT)
    plot = _plot_lines(view, width, min(room, MAX_PLOT_HEIGHT)) if room >= MIN_PLOT_HEIGHT else []
    lines = [*head, *plot, *body, *samples]
    if not view.outcome:
        lines = lines[: max(height - 1, 1)]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    screen = Text("\n").join(lines)
    screen.no_wrap = True
    screen.overflow = "crop"
    return screen


def _head_lines(view: RunProgress, width: int) -> list[Text]:
    position = view.describe_position()
    lines = [Text(escape(str(view.run.path)), "bold")]
    if view.plan is None:
        lines.append(Text(position))
    else:
        share = view.last_record.get("iteration", 0) / view.plan.iterations
        bar = draw_bar(share, max(10, min(40, width - len(position) - 14)))
        lines.append(Text.assemble("train ", (bar, "cyan"), f" {share:4.0%} {position}"))
    return [*lines, Text(view.describe_time())]


def _plot_lines(view: RunProgress, width: int, height: int) -> list[Text]:
    """Return the lines of the chart of losses, with coloured marks, in this many characters."""
    curve = draw_curve(
        view.records,
        width=max(10, width - LABEL_WIDTH - 4),
        height=height,
        last_step=None if view.plan is None else view.plan.steps,
    )
    lines = []
    for content in curve.split("\n"):
        line = Text(content)
        line.highlight_regex(re.escape(TRAINING_MARK), "cyan")
        line.highlight_regex(rf"(?<![a-z]){VALIDATION_MARK}(?![a-z])", "magenta")
        lines.append(line)
    return lines


def describe_stages(view: RunProgress) -> Iterator[str]:
    """Yield a line for each stage after training, with the time that it took."""
    stages = list(view.stages)  # another thread adds to them
    for number, (name, began) in enumerate(stages, start=1):
        is_open = number == len(stages) and not view.outcome
        ended = view.seconds if number == len(stages) else stages[number][1]
        yield f"{name} ..." if is_open else f"{name}: {format_clock(ended - began)}"


def _body_lines(view: RunProgress, width: int) -> list[Text]:
    """Return the lines below the chart: losses, speed, memory, tiers, stages and the outcome."""
    losses = describe_last_losses(view.records, view.plan)
    sentences = [
        *(f"{name} {text}" for name, text in losses.items()),
        *_join_if_they_fit([view.describe_speed(), view.describe_memory()], width),
        view.describe_tiers(),
        *describe_stages(view),
    ]
    if not view.records and not view.stages:
        sentences.insert(0, "measuring the loss before training ...")
    lines = [Text(line) for text in sentences if text for line in _escape_and_wrap(text, width)]
    return lines + [Text(line, "bold") for t in view.outcome for line in _escape_and_wrap(t, width)]


def _join_if_they_fit(texts: list[str], width: int) -> list[str]:
    """Return the texts on one line if they fit there, else on one each."""
    line = ", ".join(filter(None, texts))
    return [line] if len(line) <= width else texts


def _escape_and_wrap(text: str, width: int) -> list[str]:
    """Escape a text (others named files and suites), and wrap it to the width."""
    return textwrap.wrap(escape(text), width, subsequent_indent="  ")
