"""The losses of a run as a curve of characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nested_core.text.loss_format import format_loss

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
