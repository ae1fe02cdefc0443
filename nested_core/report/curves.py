"""A run's losses as a page: the latest in words, a chart over the steps, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nested_core.records.plan import join_last_losses
from nested_core.text.document import Document, Figures, Table, Text
from nested_core.text.loss_format import format_loss
from nested_core.text.svg_chart import Chart, Curve, Point

MAX_SHOWN_EVALUATIONS = 12
CURVE_NAMES = {"loss": "training loss", "val_loss": "validation loss"}


def describe_curves(
    records: Sequence[Mapping[str, object]], steps: int, dataset: str, unit: str
) -> Document:
    """Build a page on the losses in the records of metrics.jsonl.

    steps: the number of steps of the whole run. dataset: its name, for the text.
    unit: of the losses.
    """
    sentence = (
        f"{join_last_losses(records, None)}. In {unit}, of {steps:,} steps; training loss on "
        f"the train split, validation loss on the valid split of {dataset}."
    )
    rows = [(record["step"], record["val_loss"]) for record in records if "val_loss" in record]
    table = Table("", ("step", "validation loss"), rows[-MAX_SHOWN_EVALUATIONS:])
    figures = Figures([[chart_losses(records, steps, unit)]])
    return Document("Loss while training", [Text(sentence), figures, *([table] if rows else [])])


def chart_losses(records: Sequence[Mapping[str, Any]], steps: int, unit: str) -> Chart:
    """Chart training and validation loss over the steps so far."""
    curves = []
    for key, name in CURVE_NAMES.items():
        points = [Point(record["step"], record[key]) for record in records if key in record]
        last = next((point.y for point in reversed(points) if point.y is not None), None)
        label = f"{name}: none yet" if last is None else f"{name} {format_loss(last)}"
        curves.append(Curve(label, points, has_dots=True))
    return Chart("Loss", f"step, of {steps:,}", unit, curves)
